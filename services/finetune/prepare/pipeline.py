"""Dataset rows to packed, memory-mapped blocks: read, render, tokenise, cut, lay out.

Rows are read in shards, each by whichever process is free, and put together in order, so that the result does not
depend on how many processes there are. No process holds more than some rows at a time; of a finished sample only its
length stays in memory.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from services.finetune.config import DataConfig
from services.finetune.errors import InvalidArgument, from_json
from services.finetune.formats import Problem
from services.finetune.packing import HELD_OUT, Blocks, Flat, Pictures, block_length, held, lay_out, offsets_of, order
from services.finetune.prepare.samples import EDGES, MAX_PROBLEMS, Done, Task, Worker, ready, start, work
from services.finetune.prepare.shards import Shard, Source, cut, lines_before
from services.finetune.templates import load_template
from services.finetune.tokenizer import HUGGING_FACE, Proof, Tokenizer
from services.finetune.vision import check_token, read_form

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Longs = NDArray[np.int64]

_DRAW = 2**33
"""Far from the epochs and the datasets' own numbers, so that no draw repeats an order of blocks."""
_BYTES_A_PROCESS = 16 << 20
"""A process takes a second to start; less than this is not worth one."""


@dataclass(frozen=True, slots=True)
class Built:
    """What `build` made."""

    blocks: Blocks
    index: Mapping[str, Any]
    """What is in index.json."""
    proof: Proof
    """Which tokenizer library was used, and why."""
    problems: tuple[Problem, ...]
    """The first bad rows; index["skipped"] counts all by reason."""


class _Differs(Exception):
    """fastokens gave other ids for a text of the dataset's own."""


def build(
    sources: Sequence[Source],
    template: str,
    model_dir: Path,
    data: DataConfig,
    seed: int,
    out: Path,
    *,
    held_out: float = 0.0,
    processes: int = 0,
    on_rows: Callable[[int], None] | None = None,
) -> Built:
    """Write the blocks of all sources into the folder `out`; equal arguments write equal bytes.

    `template` is a template's name or "" for the model's own, `model_dir` holds the tokenizer's files and, if the model
    sees, what vision.read_form reads. `held_out` is the part of the distinct samples that is laid out apart, in the
    folder HELD_OUT, each once. `processes` 0 is one for each core, as far as there is work. `on_rows` hears how many rows
    are done; what it raises ends the work.

    Raises InvalidArgument (DATASET_EMPTY, VALIDATION_EMPTY, WEIGHT_INVALID, TEMPLATE_UNKNOWN), FailedPrecondition
    (TEMPLATE_MISSING, TOKENIZER_MISSING, TOKENIZER_INVALID, VISION_UNSUPPORTED, IMAGE_TOKEN_MISSING), and what reading
    the files raises. Bad rows are skipped and told, also those whose images are bad; a good row that the template or the
    model has no place for is blamed by InvalidArgument with its reason.
    """
    _check(sources)
    tokenizer = Tokenizer.from_files(model_dir)
    load_template(template, tokenizer)
    form = read_form(model_dir)
    if form is not None:
        check_token(form, tokenizer)
    digests = list(dict.fromkeys(digest for s in sources for digest, _ in (s.images or {}).values()))
    numbers = {digest: n for n, digest in enumerate(digests)}
    images = tuple(
        None if s.images is None else {name: (numbers[digest], path) for name, (digest, path) in s.images.items()}
        for s in sources
    )
    dtype = "<u2" if max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) < 2**16 else "<i4"
    shards = cut(sources)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        task = Task(template, model_dir, data, dtype, Path(folder), form, images)
        with _Team(task, tokenizer, shards, processes) as team:
            proof = tokenizer.accelerate()
            try:
                made = _Gathered(out, task, on_rows).run(team, shards, proof)
            except _Differs as error:
                proof = Proof(HUGGING_FACE, proof.texts, str(error))
                made = _Gathered(out, task, on_rows).run(team, shards, proof)
    return _finish(made, sources, digests, tokenizer, data, seed, held_out, out)


class _Gathered:
    """The samples of all shards, put together in order."""

    def __init__(self, out: Path, task: Task, on_rows: Callable[[int], None] | None) -> None:
        self.out, self.task, self._on_rows = out, task, on_rows
        self.sizes: list[Longs] = []
        self.images: list[NDArray[np.int32]] = []
        self.of_source: Counter[int] = Counter()
        self.rows_of_source: Counter[int] = Counter()
        self.total = Done(Shard(0, 0, "", Path(), "", {}))
        self._bits: list[NDArray[np.bool_]] = []

    def run(self, team: _Team, shards: Sequence[Shard], proof: Proof) -> _Gathered:
        self.proof = proof
        with (self.out / "tokens.bin").open("wb") as tokens, (self.out / "mask.bin").open("wb") as mask:
            for done in team.work(shards, proof):
                if done.error is not None:
                    raise from_json(done.error)
                if done.refused is not None:
                    raise _refused(done)
                if done.differs:
                    raise _Differs(done.differs)
                self._add(done, tokens, mask)
                if self._on_rows is not None:
                    self._on_rows(self.total.rows)
            self._flush(mask, last=True)
        return self

    def _add(self, done: Done, tokens: Any, mask: Any) -> None:
        import numpy as np

        path = self.task.scratch / str(done.shard.number)
        with path.with_suffix(".tokens").open("rb") as part:
            while piece := part.read(1 << 24):
                tokens.write(piece)
        with path.with_suffix(".mask").open("rb") as part:
            while piece := part.read(1 << 24):
                self._bits.append(np.frombuffer(piece, bool))
                self._flush(mask)
        self.sizes.append(np.fromfile(path.with_suffix(".sizes"), "<i8").reshape(-1, 3))
        self.images.append(np.fromfile(path.with_suffix(".images"), "<i4"))
        for suffix in (".tokens", ".mask", ".sizes", ".images"):
            path.with_suffix(suffix).unlink()
        self._count(done)

    def _count(self, done: Done) -> None:
        total = self.total
        told = done.problems[: MAX_PROBLEMS - len(total.problems)]
        before = lines_before(done.shard) if told else 0
        total.problems += [replace(problem, row=problem.row + before) for problem in told]
        for name in ("rows", "samples", "truncated", "dropped", "cut_images", "compared"):
            setattr(total, name, getattr(total, name) + getattr(done, name))
        total.skipped.update(done.skipped)
        total.histogram = [a + b for a, b in zip(total.histogram, done.histogram, strict=True)]
        self.of_source[done.shard.source] += done.samples
        self.rows_of_source[done.shard.source] += done.rows

    def _flush(self, mask: Any, last: bool = False) -> None:
        """Write the bits that make whole bytes, at the end all."""
        import numpy as np

        bits = np.concatenate(self._bits) if self._bits else np.zeros(0, bool)
        whole = len(bits) if last else len(bits) // 8 * 8
        mask.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._bits = [bits[whole:]]


def _finish(
    made: _Gathered,
    sources: Sequence[Source],
    digests: Sequence[str],
    tokenizer: Tokenizer,
    data: DataConfig,
    seed: int,
    held_out: float,
    out: Path,
) -> Built:
    import numpy as np

    total = made.total
    lengths, learned, pictured = np.concatenate([np.zeros((0, 3), np.int64), *made.sizes]).T
    chosen = _chosen([(s.weight, made.of_source[n]) for n, s in enumerate(sources)], seed)
    if not len(chosen):
        why = f"; the first bad one is {_told(total.problems[0])}" if total.problems else ""
        raise InvalidArgument(
            f"none of the {total.rows} rows has an answer within data.max_length = {data.max_length} tokens{why}",
            reason="DATASET_EMPTY",
        )
    tokens, mask = np.memmap(out / "tokens.bin", made.task.dtype, "r"), np.memmap(out / "mask.bin", "u1", "r")
    offsets, pictures = offsets_of(lengths), _pictures(made, pictured, digests)

    def laid_out(some: Longs) -> Blocks:
        members, starts = lay_out(lengths[some], data.max_length, data.pack, seed)
        length = block_length(lengths[some], data.max_length, data.pack)
        flat = Flat(length, tokens, mask, offsets, some[members], starts, pictures)
        return Blocks.of(flat, int(learned[some].sum()), total.truncated, total.dropped)

    proof = replace(made.proof, texts=made.proof.texts + total.compared)
    about = _about(made, sources, tokenizer, proof)
    if held_out:
        apart = held(tokens, offsets, held_out, seed, pictures)
        laid_out(np.flatnonzero(apart)).save_layout(out / HELD_OUT, {})
        chosen = chosen[~apart[chosen]]
        about["held_out"] = json.loads((out / HELD_OUT / "index.json").read_text("utf-8"))
    if data.max_rows:
        chosen = chosen[np.sort(order(len(chosen), _DRAW, seed)[: data.max_rows])]
    laid_out(chosen).save_layout(out, {**about, "drawn": len(chosen) if data.max_rows else 0})
    index = json.loads((out / "index.json").read_text("utf-8"))
    return Built(Blocks.open(out), index, proof, tuple(total.problems))


def _pictures(made: _Gathered, pictured: Longs, digests: Sequence[str]) -> Pictures | None:
    """The images of all samples, only those counted that occur; None if there are none."""
    import numpy as np

    if not pictured.any():
        return None
    used, numbers = np.unique(np.concatenate(made.images), return_inverse=True)
    found = Pictures(tuple(digests[n] for n in used) if digests else (), numbers.astype(np.int32), offsets_of(pictured))
    if digests:
        found.save(made.out)
    return found


def _about(made: _Gathered, sources: Sequence[Source], tokenizer: Tokenizer, proof: Proof) -> dict[str, Any]:
    total = made.total
    seen = sum(map(len, made.images))
    images = {"images": {"count": seen, "cut": total.cut_images}} if seen or total.cut_images else {}
    return {
        **images,
        "rows": total.rows,
        "skipped": dict(sorted(total.skipped.items())),
        "lengths": {"edges": list(EDGES), "counts": total.histogram},
        "sources": [
            {"rows": made.rows_of_source[n], "samples": made.of_source[n], "weight": s.weight}
            for n, s in enumerate(sources)
        ],
        "tokenizer": {
            "digest": tokenizer.digest,
            "backend": proof.backend,
            "compared": proof.texts,
            "reason": proof.reason,
        },
    }


def _chosen(weighted: Iterable[tuple[float, int]], seed: int) -> Longs:
    """The numbers of the samples that are laid out: source by source, (weight, samples) each."""
    import numpy as np

    found, first = [np.zeros(0, np.int64)], 0
    for n, (weight, samples) in enumerate(weighted):
        own = np.arange(first, first + samples)
        # Far from the epochs, so that no choice repeats an order of blocks.
        some = np.sort(order(samples, 2**32 + n, seed)[: round(samples * (weight % 1))])
        found += [own] * int(weight) + [own[some]]
        first += samples
    return np.concatenate(found)


def _check(sources: Sequence[Source]) -> None:
    for source in sources:
        if not 0 < source.weight <= 1000:
            raise InvalidArgument(
                f"the weight of {source.name} must be above 0 and at most 1000, not {source.weight}",
                reason="WEIGHT_INVALID",
            )


def _refused(done: Done) -> InvalidArgument:
    """Bad rows were settled when their revision was committed; this one is good, so it must not be left out unseen."""
    assert done.refused is not None
    row = replace(done.refused, row=done.refused.row + lines_before(done.shard))
    return InvalidArgument(
        f"{_told(row)}; validate the revision with this template to see all such rows",
        reason=row.reason,
        metadata={"file": row.file, "row": str(row.row)},
    )


def _told(problem: Problem) -> str:
    return f"files[{problem.file}].rows[{problem.row}]: {problem.message}"


class _Team:
    """This process and, if the work is worth it, others; they start while this one does what comes first."""

    def __init__(self, task: Task, tokenizer: Tokenizer, shards: Sequence[Shard], processes: int) -> None:
        size = sum((s.stop or s.path.stat().st_size) - s.start for s in shards)
        cores = len(os.sched_getaffinity(0))
        self._others = min(processes or min(cores, -(-size // _BYTES_A_PROCESS)), len(shards)) - 1
        self._own = Worker(task, tokenizer)
        self._pool: ProcessPoolExecutor | None = None
        if self._others > 0:
            spawn = get_context("spawn")
            self._pool = ProcessPoolExecutor(self._others, mp_context=spawn, initializer=start, initargs=(task,))
            self._pool.submit(ready)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def work(self, shards: Sequence[Shard], proof: Proof) -> Iterator[Done]:
        """What became of each shard, in order."""
        todo: deque[Shard] = deque(shards)
        given: deque[Future[Done]] = deque()
        try:
            while todo or given:
                while self._pool is not None and todo and sum(not f.done() for f in given) < 2 * self._others:
                    given.append(self._pool.submit(work, todo.popleft(), proof))
                if todo and not (given and given[0].done()):
                    given.append(_done(self._own.work(todo.popleft(), proof)))
                else:
                    yield given.popleft().result()
        finally:
            # Who is still at work writes files, which must not happen beside whatever is done next.
            for future in given:
                future.cancel()
            wait(given)


def _done(done: Done) -> Future[Done]:
    """Work done here, as that of others."""
    future: Future[Done] = Future()
    future.set_result(done)
    return future
