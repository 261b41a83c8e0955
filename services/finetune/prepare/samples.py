"""Shards to samples: what each process of `pipeline` does."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.finetune.config import DataConfig
from services.finetune.errors import FailedPrecondition, QuartetError
from services.finetune.formats import Problem, Row
from services.finetune.packing import offsets_of
from services.finetune.prepare.images import Images
from services.finetune.prepare.rendering import Renderer, Run
from services.finetune.prepare.shards import Shard, read
from services.finetune.templates import load_template
from services.finetune.tokenizer import Proof, Tokenizer
from services.finetune.vision import ImageForm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Longs = NDArray[np.int64]

MAX_PROBLEMS = 100
"""Bad rows that are told in full; all are counted."""
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Where the bars of the lengths histogram begin, in tokens; the last has no end."""
COMPARED = 8
"""Texts of each shard that both libraries tokenise, if it is fastokens that is used."""

_BATCH_CHARACTERS = 1 << 20

_Rendered = tuple[list[Run], Sequence[int]]
"""The texts of a row, and the numbers of its images; no texts for a row that is left out."""


@dataclass(frozen=True, slots=True)
class Task:
    """What all shards have in common."""

    template: str
    model_dir: Path
    data: DataConfig
    dtype: str
    scratch: Path
    form: ImageForm | None = None
    images: tuple[Mapping[str, tuple[int, Path]] | None, ...] = ()
    """Of each source the files that its rows may name, by path: the number of the image, and the path on disk."""


@dataclass(slots=True)
class Done:
    """What became of a shard; its samples lie in scratch files."""

    shard: Shard
    rows: int = 0
    samples: int = 0
    truncated: int = 0
    dropped: int = 0
    cut_images: int = 0
    """Images of kept samples that lay behind the cut, or on it."""
    compared: int = 0
    differs: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    histogram: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    error: dict[str, Any] | None = None
    refused: Problem | None = None
    """The first good row that the template has no place for."""


class Worker:
    """Reads, renders and tokenises shards."""

    def __init__(self, task: Task, tokenizer: Tokenizer | None = None) -> None:
        self._task = task
        self._tokenizer = tokenizer or Tokenizer.from_files(task.model_dir)
        template = load_template(task.template, self._tokenizer)
        self._render = Renderer(template, self._tokenizer, task.data.system, task.form is not None).runs
        self._sight = [
            None if files is None else Images({n: f for n, (_, f) in files.items()}) for files in task.images
        ]

    def work(self, shard: Shard, proof: Proof) -> Done:
        self._tokenizer.adopt(proof)
        done = Done(shard)
        try:
            path = self._task.scratch / str(shard.number)
            with (
                path.with_suffix(".tokens").open("wb") as tokens,
                path.with_suffix(".mask").open("wb") as mask,
                path.with_suffix(".sizes").open("wb") as sizes,
                path.with_suffix(".images").open("wb") as images,
            ):
                for batch in self._batches(shard, done):
                    arrays: tuple[NDArray[Any], ...] = self._encode(batch, done)
                    for out, array in zip((tokens, mask, sizes, images), arrays, strict=True):
                        array.tofile(out)
        except QuartetError as error:
            done.error = error.to_json()  # the class itself cannot be sent between processes
        return done

    def _batches(self, shard: Shard, done: Done) -> Iterator[list[_Rendered]]:
        """The texts of the good rows, some rows at a time."""
        batch: list[_Rendered] = []
        size = 0
        for row in read(shard, self._task.scratch):
            done.rows += 1
            texts, images = self._rendered(row, shard, done)
            if texts:
                batch.append((texts, images))
                size += sum([len(text) for text, _, _ in texts])
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _rendered(self, row: Row | Problem, shard: Shard, done: Done) -> _Rendered:
        images: Sequence[int] = ()
        if isinstance(row, Row) and row.conversation.images and self._task.form is not None:
            row, images = self._seen(row, shard.source)
        if isinstance(row, Row):
            try:
                return self._render(row.conversation), images
            except FailedPrecondition:
                raise  # the template fits no conversation at all
            except QuartetError as error:
                row = Problem(row.file, row.row, "", error.reason, error.message)
                done.refused = done.refused or row
        done.skipped[row.reason] += 1
        if len(done.problems) < MAX_PROBLEMS:
            done.problems.append(row)
        return [], ()

    def _seen(self, row: Row, source: int) -> tuple[Row | Problem, Sequence[int]]:
        """A row and the numbers of its images, or what is wrong with the first bad one."""
        sight, files = self._sight[source], self._task.images[source]
        if sight is None or files is None:
            return row, [0] * len(row.conversation.images)
        if problems := sight.check(row):
            return problems[0], ()
        return row, [files[path][0] for path in sight.paths(row)]

    def _encode(
        self, batch: Sequence[_Rendered], done: Done
    ) -> tuple[NDArray[Any], NDArray[np.bool_], Longs, NDArray[np.int32]]:
        """The samples that are kept, cut and with their first token unlearned: ids, mask, of each sample how many tokens
        and learned tokens and images it has, and the images' numbers."""
        import numpy as np

        texts, trained, special = zip(*[run for row, _ in batch for run in row], strict=True)
        ids, begins = self._tokenizer.encode_batch(texts, special)
        if not done.compared:
            done.compared = min(len(texts), COMPARED)
            done.differs = self._tokenizer.compare(texts[:COMPARED])
        ids, begins, images = self._expanded(ids, begins)
        counts = np.diff(begins)
        # All that follows is reckoned by runs; tokens are only copied.
        rows = offsets_of(np.array([len(row) for row, _ in batch]))
        lengths, first = np.diff(begins[rows]), begins[rows[:-1]]
        most = self._limits(first, lengths, images)
        kept = np.clip(np.repeat(first + most, np.diff(rows)) - begins[:-1], 0, counts)
        # The first token of a sample is predicted by nothing of its own, so it is never learned.
        flags = np.array(trained)
        learned = np.add.reduceat(kept * flags, rows[:-1]) - _of_first_token(flags, counts, rows)
        learns = learned > 0
        self._tally(lengths, learns, done)
        mask = np.repeat(flags, counts)
        mask[first[lengths > 0]] = False
        left = np.minimum(lengths, most)
        pictured = np.searchsorted(images, first + left) - np.searchsorted(images, first)
        sizes = np.column_stack((left, learned, pictured))[learns].astype("<i8")
        shown = [(own, n) for (_, own), n, keep in zip(batch, pictured.tolist(), learns, strict=True) if keep and own]
        done.cut_images += sum(len(own) - n for own, n in shown)
        stretches = _stretches((ids.astype(self._task.dtype), mask), first, lengths, most, learns)
        return *stretches, sizes, np.array([i for own, n in shown for i in own[:n]], "<i4")

    def _expanded(self, ids: NDArray[np.int32], begins: Longs) -> tuple[NDArray[np.int32], Longs, Longs]:
        """ids and where their texts begin, with each image's one token repeated; and where the images begin."""
        import numpy as np

        form = self._task.form
        if form is None or not len(at := np.flatnonzero(ids == form.token_id)):
            return ids, begins, np.zeros(0, np.int64)
        times = np.ones(len(ids), np.int64)
        times[at] = form.tokens
        places = offsets_of(times)
        return np.repeat(ids, times), places[begins], places[at]

    def _limits(self, first: Longs, lengths: Longs, images: Longs) -> Longs:
        """How many tokens of each row may stay: the most that a block holds, or up to the image that would be cut."""
        import numpy as np

        most = np.full(len(first), self._task.data.max_length)
        form = self._task.form
        if form is None or not len(images):
            return most
        end = first + most
        last = images[np.maximum(np.searchsorted(images, end) - 1, 0)]
        torn = (lengths > most) & (last >= first) & (last < end) & (last + form.tokens > end)
        return np.where(torn, last - first, most)

    def _tally(self, lengths: Longs, learns: NDArray[np.bool_], done: Done) -> None:
        import numpy as np

        histogram = np.bincount(np.searchsorted(EDGES, lengths, "right") - 1, minlength=len(EDGES))
        done.histogram = [a + int(b) for a, b in zip(done.histogram, histogram, strict=True)]
        done.truncated += int((lengths > self._task.data.max_length).sum())
        done.dropped += int((~learns).sum())
        done.samples += int(learns.sum())


def _of_first_token(flags: NDArray[np.bool_], counts: Longs, rows: Longs) -> Longs:
    """1 for each row whose first token is in a trained run, else 0."""
    import numpy as np

    filled = np.flatnonzero(counts)
    at = np.searchsorted(filled, rows[:-1])
    some = at < np.searchsorted(filled, rows[1:])
    return np.where(some, flags[filled[np.minimum(at, max(len(filled) - 1, 0))]] if len(filled) else 0, 0)


def _stretches(
    arrays: tuple[NDArray[Any], NDArray[np.bool_]], begins: Longs, lengths: Longs, most: Longs, keep: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Of rows that stand one after another the first `most` of each that is kept; few rows are cut or left out."""
    import numpy as np

    odd = np.flatnonzero(~keep | (lengths > most))
    ends = np.where(keep[odd], begins[odd] + most[odd], begins[odd])
    nexts = begins[odd] + lengths[odd]
    whole = [slice(a, b) for a, b in zip([0, *nexts.tolist()], [*ends.tolist(), None], strict=True)]
    ids, mask = (np.concatenate([array[s] for s in whole]) for array in arrays)
    return ids, mask


_worker: Worker | None = None
"""This process's own, in a process of a pool."""


def start(task: Task) -> None:
    global _worker
    # Each process has its core; threads of the tokenizers would only wait for each other.
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    # A signal goes to the whole group; it is for the process that leads, and no other goes before that one or after it.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_leader, daemon=True).start()
    _worker = Worker(task)


def _leave_with_leader() -> None:
    leader = parent_process()
    assert leader is not None
    leader.join()
    os._exit(1)


def ready() -> None:
    """What a pool is asked first, so that its processes start."""


def work(shard: Shard, proof: Proof) -> Done:
    assert _worker is not None
    return _worker.work(shard, proof)
