"""ADAPTER of a checkpoint that was trained whole: a model of kind MERGED, its base with the trained weights in it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping

import torch

from services.finetune.config import to_json
from services.finetune.convert.modules import in_files
from services.finetune.convert.rest import meta_of_tuned, rest, with_dtype
from services.finetune.convert.shards import Stored, progress
from services.finetune.convert.stream import Piece, Writer, cast, check_layout, layout, read_model
from services.finetune.errors import InvalidArgument
from services.finetune.orders import AdapterTask, ArtifactRef
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import Manifest, Parent, load, publish, read_file
from services.finetune.store.port import Store

REVISION = 1
"""Of the bytes that this code makes: files of an earlier attempt with another are made again."""


def make_whole(
    task: AdapterTask, named: ArtifactRef, checkpoint: Manifest, attempt: Attempt, stop: threading.Event
) -> str:
    """The digest of a "merged" artifact made of one of our checkpoints.

    InvalidArgument (SHARD_SIZE_INVALID, CHECKPOINT_INCOMPLETE), Cancelled (STOPPED).
    """
    check_layout(task.dtype, task.max_shard_size_bytes)
    store = attempt.store
    base = load(store, next(p.digest for p in checkpoint.parents if p.role == "base"))
    kept, trained = _tensors(store, checkpoint, base)

    def pieces(tensor: Stored) -> Iterable[Piece]:
        return cast(store, trained.get(tensor.name) or kept[tensor.name], tensor)

    shards = layout(base, list(kept.values()), trained.keys(), task.dtype, task.max_shard_size_bytes)
    mark = json.dumps([REVISION, to_json(task), torch.__version__], sort_keys=True)
    files = Writer(attempt, mark, progress(attempt, stop)).write(shards, pieces)
    config = with_dtype(json.loads(read_file(store, base, "config.json")), task.dtype)
    files += rest(store, base, config, checkpoint.meta["template"])
    parents = (*checkpoint.parents, Parent("checkpoint", named.digest, named.name))
    meta = meta_of_tuned(base.meta, checkpoint.meta, task.dtype)
    return publish(store, Manifest("merged", tuple(sorted(files, key=lambda f: f.path)), parents, meta))


def _tensors(store: Store, checkpoint: Manifest, base: Manifest) -> tuple[dict[str, Stored], Mapping[str, Stored]]:
    """(the base's tensors that the model will have, those that were trained), by the names that the base's files have."""
    tied = json.loads(read_file(store, checkpoint, "state.json"))["tied"]
    kept = {t.name: t for t in read_model(store, base)}
    in_file = in_files(kept.values(), json.loads(read_file(store, base, "config.json")))

    def own(name: str) -> str:
        name = in_file(name)
        # Files of some models have no name for the whole, which transformers gives it.
        return name if name in kept else name.partition(".")[2]

    weights = [t for t in read_model(store, checkpoint) if t.file.name.startswith("model")]
    trained = {own(t.name): t for t in weights}
    for name, tensor in trained.items():
        if name not in kept or kept[name].shape != tensor.shape:
            raise InvalidArgument(
                f"the base has no {tensor.name} {list(tensor.shape)}; train again or take another checkpoint",
                reason="CHECKPOINT_INCOMPLETE",
                metadata={"tensor": tensor.name},
            )
    for name in map(own, tied):
        kept.pop(name, None)
    return kept, trained
