"""Shards to samples: what each process of `pipeline` does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.finetune.config import DataConfig
from services.finetune.errors import FailedPrecondition, QuartetError
from services.finetune.formats import Problem, Row
from services.finetune.packing import offsets_of, ranges
from services.finetune.prepare.rendering import Renderer, Run
from services.finetune.prepare.shards import Shard, lines, read
from services.finetune.templates import load_template
from services.finetune.tokenizer import Proof, Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Longs = NDArray[np.int64]

MAX_PROBLEMS = 100
"""Bad rows that are told in full; all are counted."""
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Where the bars of the lengths histogram begin, in tokens; the last has no end."""
COMPARED = 16
"""Texts of each shard that both libraries tokenise, if it is fastokens that is used."""

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Task:
    """What all shards have in common."""

    template: str
    model_dir: Path
    data: DataConfig
    dtype: str
    proof: Proof
    scratch: Path


@dataclass(slots=True)
class Done:
    """What became of a shard; its samples lie in scratch files."""

    shard: Shard
    rows: int = 0
    lines: int = 0
    samples: int = 0
    truncated: int = 0
    dropped: int = 0
    compared: int = 0
    differs: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    histogram: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    error: dict[str, Any] | None = None


class Worker:
    """Reads, renders and tokenises shards."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._tokenizer = Tokenizer.from_files(task.model_dir)
        self._tokenizer.adopt(task.proof)
        self._render = Renderer(load_template(task.template, self._tokenizer), self._tokenizer, task.data.system).runs

    def work(self, shard: Shard) -> Done:
        done = Done(shard)
        try:
            done.lines = lines(shard)
            path = self._task.scratch / str(shard.number)
            with (
                path.with_suffix(".tokens").open("wb") as tokens,
                path.with_suffix(".mask").open("wb") as mask,
                path.with_suffix(".sizes").open("wb") as sizes,
            ):
                for batch in self._batches(shard, done):
                    for out, array in zip((tokens, mask, sizes), self._encode(batch, done), strict=True):
                        array.tofile(out)
        except QuartetError as error:
            done.error = error.to_json()  # the class itself cannot be sent between processes
        return done

    def _batches(self, shard: Shard, done: Done) -> Iterator[list[list[Run]]]:
        """The texts of the good rows, some rows at a time."""
        batch: list[list[Run]] = []
        size = 0
        for row in read(shard, self._task.scratch):
            done.rows += 1
            texts = self._rendered(row, done)
            if texts:
                batch.append(texts)
                size += sum([len(text) for text, _, _ in texts])
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _rendered(self, row: Row | Problem, done: Done) -> list[Run]:
        if isinstance(row, Row):
            try:
                return self._render(row.conversation)
            except FailedPrecondition:
                raise  # the template fits no conversation at all
            except QuartetError as error:
                row = Problem(row.file, row.row, "", error.reason, error.message)
        done.skipped[row.reason] += 1
        if len(done.problems) < MAX_PROBLEMS:
            done.problems.append(row)
        return []

    def _encode(self, batch: Sequence[Sequence[Run]], done: Done) -> tuple[NDArray[Any], NDArray[np.bool_], Longs]:
        """The samples that are kept, cut and with their first token unlearned: ids, mask, and of each sample how many
        tokens it has and how many of them are learned."""
        import numpy as np

        texts, trained, special = zip(*[run for row in batch for run in row], strict=True)
        ids, counts = self._tokens(texts, np.array(special))
        if not done.compared:
            done.compared = min(len(texts), COMPARED)
            done.differs = self._tokenizer.compare(texts[:COMPARED])
        mask = np.repeat(np.array(trained), counts)
        lengths = np.diff(offsets_of(counts)[offsets_of(np.array([len(row) for row in batch]))])
        places = ranges(np.zeros_like(lengths), lengths)
        # The first token of a sample is predicted by nothing of its own, so it is never learned.
        inside = places < self._task.data.max_length
        mask &= inside & (places > 0)
        learned = np.diff(offsets_of(mask)[offsets_of(lengths)])
        learns = learned > 0
        inside &= np.repeat(learns, lengths)
        histogram = np.bincount(np.searchsorted(EDGES, lengths, "right") - 1, minlength=len(EDGES))
        done.histogram = [a + int(b) for a, b in zip(done.histogram, histogram, strict=True)]
        done.truncated += int((lengths > self._task.data.max_length).sum())
        done.dropped += int((~learns).sum())
        done.samples += int(learns.sum())
        kept = np.minimum(lengths[learns], self._task.data.max_length)
        sizes = np.column_stack((kept, learned[learns])).astype("<i8")
        return ids[inside].astype(self._task.dtype), mask[inside], sizes

    def _tokens(self, texts: Sequence[str], special: NDArray[np.bool_]) -> tuple[NDArray[np.int32], Longs]:
        """The ids of all texts and how many each has; those of plain texts are put where they belong."""
        import numpy as np

        if special.all():
            ids, offsets = self._tokenizer.encode_batch(texts)
            return ids, np.diff(offsets)
        sizes = np.zeros(len(texts), np.int64)
        parts = []
        for kind in (True, False):
            which = np.flatnonzero(special == kind)
            ids, offsets = self._tokenizer.encode_batch([texts[n] for n in which.tolist()], plain=not kind)
            sizes[which] = np.diff(offsets)
            parts.append((which, ids))
        found, begins = np.empty(int(sizes.sum()), np.int32), offsets_of(sizes)
        for which, ids in parts:
            found[ranges(begins[which], sizes[which])] = ids
        return found, sizes


_worker: Worker | None = None
"""This process's own, in a process of a pool."""


def start(task: Task) -> None:
    global _worker
    # Each process has its core; threads of the tokenizers would only wait for each other.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    _worker = Worker(task)


def work(shard: Shard) -> Done:
    assert _worker is not None
    return _worker.work(shard)
