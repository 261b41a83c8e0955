"""MERGE: an adapter is added into its base, slice by slice, from store to store (docs/decisions/0050 to 0052).

What the adapter does not touch keeps its bytes, and whole files of it are shared.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from services.finetune.config import to_json
from services.finetune.convert import merge_report
from services.finetune.convert.adapter import CONFIG, PREFIX, WEIGHTS
from services.finetune.convert.lora import Change, Changes, read_changes
from services.finetune.convert.modules import as_modules, in_files
from services.finetune.convert.rest import meta_of_tuned, rest, with_dtype
from services.finetune.convert.shards import Stored, check_stop, progress
from services.finetune.convert.stream import (
    BLOCK_NUMBERS,
    Piece,
    Writer,
    borrow_rows,
    cast,
    check_layout,
    computed,
    layout,
    read_model,
    read_rows,
    slices,
)
from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.modules import in_memory, text_config
from services.finetune.orders import MergeTask
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import Manifest, Parent, load, publish, read_file
from services.finetune.store.port import Store
from services.finetune.tokenizer import Tokenizer

Rows = Callable[[int, int], Tensor]
"""What an adapter is added to: its rows from one to another, in any floating point."""

REVISION = 1
"""Of the bytes that this code makes: files of an earlier attempt with another are made again."""


def merge(task: MergeTask, attempt: Attempt, stop: threading.Event) -> str:
    """Do a MergeTask; the digest of a "merged" artifact.

    InvalidArgument (DTYPE_UNKNOWN, SHARD_SIZE_INVALID, ADAPTER_MISMATCH, ADAPTER_INCOMPLETE, ADAPTER_UNSUPPORTED),
    FailedPrecondition (BASE_MISMATCH, MODEL_NOT_ADAPTER, MODEL_NOT_TRAINABLE), Cancelled (STOPPED).
    """
    store = attempt.store
    adapter, base = _check(task, attempt)
    made = Merge(store, base, adapter, task)
    shards = layout(base, made.changes.tensors, made.changed, task.dtype, task.max_shard_size_bytes)
    mark = json.dumps([REVISION, to_json(task), torch.__version__], sort_keys=True)
    files = Writer(attempt, mark, progress(attempt, stop)).write(shards, made.pieces)
    weights = Manifest("merged", tuple(files))
    files += rest(store, base, _config(made, task.dtype), adapter.meta["template"])
    parents = (
        Parent("base", task.base.digest, task.base.name),
        Parent("adapter", task.adapter.digest, task.adapter.name),
    )
    meta = meta_of_tuned(base.meta, adapter.meta, task.dtype)
    meta["report"] = _report(attempt, stop, made, base, adapter.meta, weights)
    return publish(store, Manifest("merged", tuple(sorted(files, key=lambda f: f.path)), parents, meta))


def _check(task: MergeTask, attempt: Attempt) -> tuple[Manifest, Manifest]:
    check_layout(task.dtype, task.max_shard_size_bytes)
    adapter, base = load(attempt.store, task.adapter.digest), load(attempt.store, task.base.digest)
    if adapter.kind != "adapter":
        raise FailedPrecondition(f"{task.adapter.name} is of kind {adapter.kind}", reason="MODEL_NOT_ADAPTER")
    own = next(p for p in adapter.parents if p.role == "base")
    if own.digest != task.base.digest:
        raise FailedPrecondition(
            f"the adapter was trained on {own.name or own.digest}, not on {task.base.name}; merge it into its own base",
            reason="BASE_MISMATCH",
        )
    return adapter, base


class Merge:
    """A base and an adapter in the store, and the bytes that they become."""

    def __init__(self, store: Store, base: Manifest, adapter: Manifest, task: MergeTask) -> None:
        self._store, self.task = store, task
        self.config: dict[str, Any] = json.loads(read_file(store, base, "config.json"))
        self.adapter_config: dict[str, Any] = json.loads(read_file(store, adapter, CONFIG))
        self.adapter = [t for t in read_model(store, adapter) if t.file.name == WEIGHTS]
        self.base = read_model(store, base)
        self.changes = self._read_changes()
        self._sources = {t.name: t for t in self.changes.tensors}
        self._rounded = self._rounded_names()
        own = {t.name for t in self.base}
        self.changed = self.changes.by_name.keys() | self._rounded | (self._sources.keys() - own)

    def _read_changes(self) -> Changes:
        """What the adapter does, by the names that the base's files have."""
        adapter = [t.named(PREFIX + in_memory(t.name.removeprefix(PREFIX), self.config)) for t in self.adapter]
        base, model = as_modules(self.base, self.config), text_config(self.config)
        found = read_changes(adapter, self.adapter_config, base, model)
        name = in_files(self.base, self.config)
        by_name = {name(n): change for n, change in found.by_name.items()}
        return Changes(by_name, [t.named(name(t.name)) for t in found.tensors], found.untied)

    def _rounded_names(self) -> set[str]:
        """The weights that are to be rounded to 4 bits first; those that the adapter replaces are its own."""
        if not self.task.base_dtype:
            return set()
        from services.finetune.convert.nf4 import KINDS, quantised_names

        if self.task.base_dtype not in KINDS:
            raise InvalidArgument(
                f"unknown base_dtype {self.task.base_dtype!r}; use {', '.join(KINDS)}", reason="DTYPE_UNKNOWN"
            )
        names = map(in_files(self.base, self.config), quantised_names(self.config, as_modules(self.base, self.config)))
        return {n for n in names if self.changes.by_name.get(n, Change()).replaced is None}

    def pieces(self, tensor: Stored) -> Iterable[Piece]:
        """The bytes of a tensor of the merged model, of `tensor`'s dtype."""
        source, change = self._sources[tensor.name], self.changes.by_name.get(tensor.name, Change())
        if change == Change() and tensor.name not in self._rounded:
            return cast(self._store, source, tensor)
        return computed(tensor, Summed(self._store, self._rows(tensor.name), source.shape, change).blocks)

    def before(self, tensor: Stored) -> Tensor:
        """A whole tensor of the base that the adapter is added to."""
        if tensor.name not in self._rounded:
            return read_rows(self._store, tensor)
        return self._rows(tensor.name)(0, tensor.shape[0])

    def _rows(self, name: str) -> Rows:
        source = self.changes.by_name.get(name, Change()).replaced or self._sources[name]
        if name not in self._rounded:
            return functools.partial(borrow_rows, self._store, source)
        from services.finetune.convert.nf4 import KINDS, Rounded

        rounded = functools.cache(lambda: Rounded(self._store, source, KINDS[self.task.base_dtype]))
        lock = threading.Lock()

        def rows(start: int, stop: int) -> Tensor:
            with lock:
                found = rounded()
            return found.rows(start, stop)

        return rows


class Summed:
    """One weight with its change, in float32. The adapter's tensors are read when the first rows are asked for."""

    def __init__(self, store: Store, rows: Rows, shape: tuple[int, ...], change: Change) -> None:
        self._store, self._rows, self._shape, self._change = store, rows, shape, change
        self._lock, self._ready = threading.Lock(), False
        self._a = self._b = self._lengths = self._added = torch.empty(0)

    def blocks(self, start: int, stop: int) -> Iterator[Tensor]:
        """Rows of the changed weight, a few at a time."""
        with self._lock:
            if not self._ready:
                self._load()
                self._ready = True
        for at, summed in self._sums(start, stop):
            if self._change.lengths is None:
                yield summed
            elif self._change.transposed:
                yield summed.mul_(self._lengths)
            else:
                lengths = self._lengths[at : at + len(summed)] / torch.linalg.norm(summed, dim=1)
                yield summed.mul_(lengths.view(-1, 1))

    def _sums(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(first row, W + scale b a) of a few rows at a time."""
        weight, change = self._rows(start, stop), self._change
        width = weight.numel() // max(len(weight), 1)
        for first, last in slices(len(weight), width, BLOCK_NUMBERS):
            rows, at, end = weight[first:last], start + first, start + last
            if change.added is not None:
                yield at, rows + self._added[at:end] * change.scale
            elif change.a is None:
                yield at, rows
            else:
                delta = self._a[:, at:end].T @ self._b.T if change.transposed else self._b[at:end] @ self._a
                yield at, delta.mul_(change.scale).add_(rows)

    def _load(self) -> None:
        change = self._change
        if change.a is not None and change.b is not None:
            self._a, self._b = self._whole(change.a), self._whole(change.b)
        if change.added is not None:
            self._added = self._whole(change.added)
        if change.lengths is not None:
            self._lengths = self._whole(change.lengths).reshape(-1)
            if change.transposed:
                self._lengths /= self._norms()

    def _norms(self) -> Tensor:
        """The length of each column of the sum, which has to be made twice for it."""
        squares = torch.zeros(self._shape[1], dtype=torch.float64)
        for start, stop in slices(self._shape[0], self._shape[1], 1 << 20):
            for _, summed in self._sums(start, stop):
                squares += summed.double().square_().sum(0)
        return squares.sqrt().float()

    def _whole(self, tensor: Stored) -> Tensor:
        return read_rows(self._store, tensor).float()


def _report(
    attempt: Attempt, stop: threading.Event, made: Merge, base: Manifest, meta: Mapping[str, Any], weights: Manifest
) -> Mapping[str, Any]:
    """The merge report, which is told as an event too; a warning if the model answers otherwise than it should."""
    store = attempt.store
    read = functools.partial(read_rows, store)
    found = merge_report.report(
        made.task.report,
        (made.config, untie(made.config) if made.changes.untied else made.config),
        made.adapter_config,
        functools.partial(Tokenizer.from_artifact, store, base),
        meta,
        (made.base, made.before),
        (made.adapter, read),
        (lambda: read_model(store, weights), read),
        lambda count: check_stop(stop),
    )
    text = "merge report: " + ", ".join(f"{k} {v}" for k, v in found.items())
    level = "warning" if merge_report.is_worrying(found) else "info"
    attempt.emit("log", level=level, text=text)
    return found


def _config(made: Merge, dtype: str) -> dict[str, Any] | None:
    """The merged model's config.json, if it is another than the base's."""
    if not dtype and not made.changes.untied:
        return None
    config = with_dtype(made.config, dtype) if dtype else made.config
    return untie(config) if made.changes.untied else config


def untie(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose head has a weight of its own."""
    inner = {k: untie(v) for k, v in config.items() if isinstance(v, dict) and "tie_word_embeddings" in v}
    return {**config, **inner, "tie_word_embeddings": False}
