"""Models from store to store: tensors are read by ranges and files streamed back, so that no disk is needed and no tensor is
ever whole in memory.

Slices are made in a few threads, ahead of the two files that are written at a time; hashing, writing and reading take turns
beside the arithmetic. Memory: at most 26 slices of SLICE_BYTES, or of a row, and what the store's own streams hold.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.finetune.convert.shards import (
    DTYPES,
    INDEX,
    TORCH_NAMES,
    WIDTHS,
    Stored,
    header,
    index_text,
    order,
    parse_header,
    plan,
    shard_names,
)
from services.finetune.errors import InvalidArgument
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest
from services.finetune.store.port import Store

SLICE_BYTES = 8 << 20
FILES_AT_ONCE = 2
MAKERS = 8
"""Threads that make slices, at most; two more than cores, as they also wait for the store."""
BLOCK_NUMBERS = 1 << 17
"""So many numbers are computed at once: their float32 forms stay in a core's own cache, which is five times as fast."""

_scratch = threading.local()


@dataclass(frozen=True, slots=True)
class Piece:
    """A slice of a tensor: `fill` writes its `nbytes` bytes into a tensor of uint8, in any thread."""

    nbytes: int
    fill: Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a model to be: its tensors as they will be; or `shared`, a file that is stored already."""

    path: str
    tensors: tuple[Stored, ...]
    shared: File | None = None


# ---------------------------------------------------------------------------------------------- reading


def read_model(store: Store, manifest: Manifest) -> list[Stored]:
    """The tensors of a stored model or adapter, by its files' headers. InvalidArgument (WEIGHTS_MALFORMED)."""
    found: list[Stored] = []
    for file in manifest.files:
        if file.path.endswith(".safetensors"):
            read = functools.partial(_read, store, file.digest)
            for t in sorted(parse_header(read, file.path), key=lambda t: t.start):
                if t.nbytes != t.count * WIDTHS.get(t.dtype, 1) or t.start + t.nbytes > file.size:
                    raise InvalidArgument(
                        f"{file.path} does not hold all of {t.name}; import the model again",
                        reason="WEIGHTS_MALFORMED",
                        metadata={"tensor": t.name},
                    )
                found.append(replace(t, file=Path(file.path), blob=file.digest))
    return found


def _read(store: Store, digest: str, offset: int, length: int) -> bytes:
    return b"".join(store.read_blob(digest, offset, length))


def row_bytes(tensor: Stored) -> int:
    """Bytes of all that has one first index; of a scalar, its own."""
    return tensor.nbytes // max(tensor.shape[0], 1) if tensor.shape else tensor.nbytes


def read_rows(store: Store, tensor: Stored, start: int = 0, stop: int | None = None) -> Tensor:
    """Rows `start` to `stop` of a stored tensor, in its own dtype."""
    rows = tensor.shape[0] if tensor.shape else 1
    stop = rows if stop is None else min(stop, rows)
    shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
    data = torch.empty((stop - start) * row_bytes(tensor), dtype=torch.uint8)
    _fill(store, tensor, start * row_bytes(tensor), data)
    return data.view(getattr(torch, TORCH_NAMES[tensor.dtype])).reshape(shape)


def borrow_rows(store: Store, tensor: Stored, start: int, stop: int) -> Tensor:
    """As read_rows, in memory that this thread's next borrow_rows takes back."""
    size = (stop - start) * row_bytes(tensor)
    data: Tensor | None = getattr(_scratch, "data", None)
    if data is None or data.numel() < size:
        data = _scratch.data = torch.empty(max(size, SLICE_BYTES), dtype=torch.uint8)
    _fill(store, tensor, start * row_bytes(tensor), data[:size])
    return data[:size].view(getattr(torch, TORCH_NAMES[tensor.dtype])).reshape(stop - start, *tensor.shape[1:])


def _fill(store: Store, tensor: Stored, at: int, data: Tensor) -> None:
    view: Any = data.numpy()
    store.read_into(tensor.blob, tensor.start + at, memoryview(view))


def slices(rows: int, each: int, limit: int) -> list[tuple[int, int]]:
    """Ranges of rows of `each` that come to at most `limit`, or of one row."""
    step = max(1, limit // max(each, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def copied(store: Store, tensor: Stored) -> Iterator[Piece]:
    """A tensor's bytes as they are."""
    for start, stop in slices(tensor.nbytes, 1, SLICE_BYTES):
        yield Piece(stop - start, functools.partial(_fill, store, tensor, start))


def computed(tensor: Stored, rows: Callable[[int, int], Iterable[Tensor]]) -> Iterator[Piece]:
    """The bytes of `tensor` as it will be. `rows` gives its rows from one to another, in blocks and in any dtype; they are
    rounded once."""
    dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    count, each = (tensor.shape[0], row_bytes(tensor)) if tensor.shape else (1, tensor.nbytes)

    def fill(start: int, stop: int, data: Tensor) -> None:
        out, at = data.view(dtype), 0
        for block in rows(start, stop):
            out[at : at + block.numel()] = block.reshape(-1)
            at += block.numel()

    for start, stop in slices(count, each, SLICE_BYTES):
        yield Piece((stop - start) * each, functools.partial(fill, start, stop))


def cast(store: Store, source: Stored, tensor: Stored) -> Iterator[Piece]:
    """The bytes of a stored tensor as those of `tensor`, rounded once if that has another dtype."""
    if source.dtype == tensor.dtype:
        return copied(store, source)
    rows = source if source.shape else replace(source, shape=(1,))
    return computed(tensor, lambda start, stop: [borrow_rows(store, rows, start, stop)])


# ---------------------------------------------------------------------------------------------- layout


def layout(base: Manifest, tensors: Sequence[Stored], changed: Container[str], dtype: str, limit: int) -> list[Shard]:
    """The files of a model made from `base`: `tensors` are its own and new ones, whose `file` says where they belong.

    The base's own division into files is kept if none is above `limit` bytes (0: none is), and a file in which nothing
    is changed or cast is shared. Else files are divided anew.
    """
    files = {f.path: f for f in base.files}
    by_file: dict[str, list[Stored]] = {}
    for t in tensors:
        by_file.setdefault(str(t.file), []).append(t)
    own = list[Shard]()
    for path, held in by_file.items():
        same = all(t.cast(dtype).dtype == t.dtype and t.name not in changed for t in held)
        own.append(Shard(path, _cast(held, dtype), files[path] if same else None))
    if not limit or all(_size(s) <= limit for s in own):
        return own
    planned = plan((t.cast(dtype) for t in tensors), limit)
    return [Shard(path, tuple(order(held))) for path, held in zip(shard_names(len(planned)), planned, strict=True)]


def _cast(tensors: Iterable[Stored], dtype: str) -> tuple[Stored, ...]:
    return tuple(order(t.cast(dtype) for t in tensors))


def _size(shard: Shard) -> int:
    if shard.shared is not None:
        return shard.shared.size
    return len(header(shard.tensors)) + sum(t.nbytes for t in shard.tensors)


# ---------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes a model's files into the store, each once: a file that an earlier attempt finished is found again.

    `mark` stands for all that decides the files' bytes. Finished files are recorded under the job's key.
    """

    def __init__(self, attempt: Attempt, mark: str, tell: Callable[[int, int], None]) -> None:
        self._store, self._attempt = attempt.store, attempt
        self._mark, self._tell = mark, tell
        self._stream = hashlib.sha256(attempt.job_key.encode()).hexdigest()[:32]
        self._lock, self._broken = threading.Lock(), threading.Event()
        self._done = self._total = 0

    def write(self, shards: Sequence[Shard], pieces: Callable[[Stored], Iterable[Piece]]) -> list[File]:
        """The files of `shards`, and their index if there are several. `pieces` makes a tensor's bytes, in order."""
        # Earlier attempts are over, or fenced off: what they streamed last will never be whole.
        self._store.drop_streams(f"{self._stream}-")
        self._total = sum(t.nbytes for s in shards for t in s.tensors)
        self._told(0)
        count = min(MAKERS, len(os.sched_getaffinity(0)) + 2)
        with (
            ThreadPoolExecutor(count, "slice", torch.set_num_threads, (1,)) as makers,
            ThreadPoolExecutor(FILES_AT_ONCE, "file") as writers,
        ):
            files = [writers.submit(self._file, s, pieces, makers, count) for s in shards]
            try:
                wait(files, return_when=FIRST_EXCEPTION)
                self._raise_first(files)
            except BaseException:
                self._broken.set()
                writers.shutdown(cancel_futures=True)
                raise
        found = [f.result() for f in files]
        if len(shards) > 1:
            index = self._store.put_blob(index_text({s.path: s.tensors for s in shards}).encode())
            found.append(File(INDEX, index.digest, index.size))
        return found

    def _raise_first(self, files: Iterable[Future[File]]) -> None:
        for file in files:
            if file.done():
                file.result()

    def _file(
        self, shard: Shard, pieces: Callable[[Stored], Iterable[Piece]], makers: ThreadPoolExecutor, ahead: int
    ) -> File:
        size, path = _size(shard), shard.path
        key = f"{self._attempt.job_key}/files/{path}.json"
        digest = shard.shared.digest if shard.shared is not None else self._recorded(key, size)
        if digest:
            self._told(sum(t.nbytes for t in shard.tensors))
            return File(path, digest, size)
        stream = f"{self._stream}-{self._attempt.number:04d}-{hashlib.sha256(path.encode()).hexdigest()[:16]}"
        blob = self._store.put_stream(stream, size, self._body(shard, pieces, makers, ahead))
        record = {"mark": self._mark, "digest": blob.digest, "size": blob.size}
        self._store.put(key, json.dumps(record).encode())
        return File(path, blob.digest, blob.size)

    def _recorded(self, key: str, size: int) -> str:
        """The digest of a file that was finished before, as long as the store has it."""
        found = self._store.get(key)
        record: Mapping[str, Any] = json.loads(found.data) if found is not None else {}
        if (
            record.get("mark") != self._mark
            or record["size"] != size
            or self._store.touch_blob(record["digest"]) is None
        ):
            return ""
        return str(record["digest"])

    def _body(
        self, shard: Shard, pieces: Callable[[Stored], Iterable[Piece]], makers: ThreadPoolExecutor, ahead: int
    ) -> Iterator[bytes | memoryview]:
        yield header(shard.tensors)
        flying, free = deque[tuple[Future[None], Tensor, int]](), list[Tensor]()
        for piece in (p for t in shard.tensors for p in pieces(t)):
            # Fresh memory costs more than what is done in it.
            data = free.pop() if free and free[-1].numel() >= piece.nbytes else _fresh(piece.nbytes)
            flying.append((makers.submit(piece.fill, data[: piece.nbytes]), data, piece.nbytes))
            if len(flying) > ahead:
                yield from self._landed(*flying.popleft(), free)
        while flying:
            yield from self._landed(*flying.popleft(), free)

    def _landed(self, filling: Future[None], data: Tensor, count: int, free: list[Tensor]) -> Iterator[memoryview]:
        filling.result()
        view: Any = data[:count].numpy()
        yield memoryview(view)
        free.append(data)
        self._told(count)

    def _told(self, count: int) -> None:
        with self._lock:
            if self._broken.is_set():
                raise RuntimeError("another file of this model could not be written")
            self._done += count
            self._tell(self._done, self._total)


def _fresh(count: int) -> Tensor:
    return torch.empty(max(count, SLICE_BYTES), dtype=torch.uint8)


def check_layout(dtype: str, limit: int) -> None:
    """InvalidArgument (DTYPE_UNKNOWN, SHARD_SIZE_INVALID)."""
    if dtype and dtype not in DTYPES:
        raise InvalidArgument(f"unknown dtype {dtype!r}; use {', '.join(DTYPES)}", reason="DTYPE_UNKNOWN")
    if limit < 0:
        raise InvalidArgument("the largest shard must have some bytes", reason="SHARD_SIZE_INVALID")
