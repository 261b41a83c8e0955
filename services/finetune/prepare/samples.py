"""Shards to samples: what each process of `pipeline` does."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.finetune.config import DataConfig
from services.finetune.errors import FailedPrecondition, QuartetError
from services.finetune.formats import Problem, Row
from services.finetune.packing import offsets_of
from services.finetune.prepare.rendering import Renderer, Run
from services.finetune.prepare.shards import Shard, read
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
COMPARED = 8
"""Texts of each shard that both libraries tokenise, if it is fastokens that is used."""

_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class Task:
    """What all shards have in common."""

    template: str
    model_dir: Path
    data: DataConfig
    dtype: str
    scratch: Path


@dataclass(slots=True)
class Done:
    """What became of a shard; its samples lie in scratch files."""

    shard: Shard
    rows: int = 0
    samples: int = 0
    truncated: int = 0
    dropped: int = 0
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
        self._render = Renderer(load_template(task.template, self._tokenizer), self._tokenizer, task.data.system).runs

    def work(self, shard: Shard, proof: Proof) -> Done:
        self._tokenizer.adopt(proof)
        done = Done(shard)
        try:
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
                done.refused = done.refused or row
        done.skipped[row.reason] += 1
        if len(done.problems) < MAX_PROBLEMS:
            done.problems.append(row)
        return []

    def _encode(self, batch: Sequence[Sequence[Run]], done: Done) -> tuple[NDArray[Any], NDArray[np.bool_], Longs]:
        """The samples that are kept, cut and with their first token unlearned: ids, mask, and of each sample how many
        tokens it has and how many of them are learned."""
        import numpy as np

        texts, trained, special = zip(*[run for row in batch for run in row], strict=True)
        ids, begins = self._tokenizer.encode_batch(texts, special)
        counts = np.diff(begins)
        if not done.compared:
            done.compared = min(len(texts), COMPARED)
            done.differs = self._tokenizer.compare(texts[:COMPARED])
        # All that follows is reckoned by runs; tokens are only copied.
        rows = offsets_of(np.array([len(row) for row in batch]))
        lengths = np.diff(begins[rows])
        most = self._task.data.max_length
        kept = np.clip(most - (begins[:-1] - np.repeat(begins[rows[:-1]], np.diff(rows))), 0, counts)
        # The first token of a sample is predicted by nothing of its own, so it is never learned.
        first = begins[rows[:-1]]
        flags = np.array(trained)
        learned = np.add.reduceat(kept * flags, rows[:-1]) - _of_first_token(flags, counts, rows)
        learns = learned > 0
        self._tally(lengths, learns, done)
        mask = np.repeat(flags, counts)
        mask[first[lengths > 0]] = False
        sizes = np.column_stack((np.minimum(lengths, most), learned))[learns].astype("<i8")
        return *_stretches((ids.astype(self._task.dtype), mask), first, lengths, most, learns), sizes

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
    arrays: tuple[NDArray[Any], NDArray[np.bool_]], begins: Longs, lengths: Longs, most: int, keep: NDArray[np.bool_]
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Of rows that stand one after another the first `most` of each that is kept; few rows are cut or left out."""
    import numpy as np

    odd = np.flatnonzero(~keep | (lengths > most))
    ends = np.where(keep[odd], begins[odd] + most, begins[odd])
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
