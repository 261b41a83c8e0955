"""RESHARD: the same weights in files of another size or in another dtype, slice by slice, from store to store.

Also what the other tasks that change a whole model's form share: reading its artifact, and naming it as the source.
"""

from __future__ import annotations

import json
import threading

import torch

from services.finetune.convert.rest import rest, with_dtype
from services.finetune.convert.shards import DTYPES, Stored, order, plan, progress, shard_names
from services.finetune.convert.stream import Shard, Writer, cast, read_model
from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.orders import ArtifactRef, ReshardTask
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, Parent, load, publish, read_file

REVISION = 1
"""Of the bytes that this code makes: files of an earlier attempt with another are made again."""


def reshard(task: ReshardTask, attempt: Attempt, stop: threading.Event) -> str:
    """Do a ReshardTask; the digest of an artifact of the model's own kind. Files that come out the same are the same blobs.

    InvalidArgument (DTYPE_UNKNOWN, SHARD_SIZE_INVALID), FailedPrecondition (MODEL_NOT_WHOLE), Cancelled (STOPPED).
    """
    if task.dtype and task.dtype not in DTYPES:
        raise InvalidArgument(f"unknown dtype {task.dtype!r}; use {', '.join(DTYPES)}", reason="DTYPE_UNKNOWN")
    if task.max_shard_size_bytes <= 0:
        raise InvalidArgument("the largest shard must have some bytes", reason="SHARD_SIZE_INVALID")
    source = whole(attempt, task.model)
    files = recut(source, task.dtype, task.max_shard_size_bytes, attempt, stop)
    recast = task.dtype and task.dtype != source.meta["dtype"]
    config = with_dtype(json.loads(read_file(attempt.store, source, "config.json")), task.dtype) if recast else None
    files += rest(attempt.store, source, config)
    meta = {**source.meta, "dtype": task.dtype or source.meta["dtype"]}
    made = tuple(sorted(files, key=lambda f: f.path))
    return publish(attempt.store, Manifest(source.kind, made, made_from(task.model), meta))


def recut(source: Manifest, dtype: str, limit: int, attempt: Attempt, stop: threading.Event) -> list[File]:
    """A model's weights in files of at most `limit` bytes. A file that would hold what one holds already is that one."""
    tensors = {t.name: t for t in read_model(attempt.store, source)}
    held: dict[str, set[str]] = {}
    for t in tensors.values():
        held.setdefault(str(t.file), set()).add(t.name)
    planned = plan((t.cast(dtype) for t in tensors.values()), limit)

    def shared(shard: list[Stored]) -> File | None:
        names = {t.name for t in shard}
        same = all(tensors[t.name].dtype == t.dtype for t in shard)
        return next((source.file(path) for path, own in held.items() if same and own == names), None)

    names = shard_names(len(planned))
    shards = [Shard(name, tuple(order(s)), shared(s)) for name, s in zip(names, planned, strict=True)]
    mark = json.dumps([REVISION, source.files[0].digest, dtype, limit, torch.__version__])
    writer = Writer(attempt, mark, progress(attempt, stop))
    return writer.write(shards, lambda t: cast(attempt.store, tensors[t.name], t))


def whole(attempt: Attempt, model: ArtifactRef) -> Manifest:
    """The manifest of a whole model with plain weights. FailedPrecondition (MODEL_NOT_WHOLE)."""
    found = load(attempt.store, model.digest)
    if found.kind not in ("base", "merged"):
        raise FailedPrecondition(f"{model.name} is of kind {found.kind}", reason="MODEL_NOT_WHOLE")
    return found


def made_from(model: ArtifactRef) -> tuple[Parent, ...]:
    """The parents of another form of a model."""
    return (Parent("source", model.digest, model.name),)
