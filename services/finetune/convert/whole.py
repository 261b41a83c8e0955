"""ADAPTER of a checkpoint that was trained whole: a model of kind MERGED, its base with the trained weights in it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping

import torch

from services.finetune.config import AdapterTask, ArtifactRef, to_json
from services.finetune.convert.shards import Stored, progress
from services.finetune.convert.stream import Piece, Writer, cast, check_layout, layout, read_model
from services.finetune.errors import InvalidArgument
from services.finetune.prepare.certificate import META, carried
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, Parent, load, publish, read_file
from services.finetune.store.port import Store
from services.finetune.templates import load_template
from services.finetune.tokenizer import Tokenizer

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
    files += _rest(store, base, checkpoint.meta["template"], task.dtype)
    parents = (*checkpoint.parents, Parent("checkpoint", named.digest, named.name))
    # A certificate of the base's own speaks of the template that the base was tuned with.
    meta = {k: v for k, v in base.meta.items() if k != META} | carried(checkpoint.meta)
    meta |= {k: checkpoint.meta[k] for k in ("template", "system", "base_name")}
    meta["dtype"] = task.dtype
    return publish(store, Manifest("merged", tuple(sorted(files, key=lambda f: f.path)), parents, meta))


def _tensors(store: Store, checkpoint: Manifest, base: Manifest) -> tuple[dict[str, Stored], Mapping[str, Stored]]:
    """(the base's tensors that the model will have, those that were trained), by the names that the base's files have."""
    tied = json.loads(read_file(store, checkpoint, "state.json"))["tied"]
    kept = {t.name: t for t in read_model(store, base)}

    def own(name: str) -> str:
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


def _rest(store: Store, base: Manifest, template: str, dtype: str) -> list[File]:
    """Config, tokenizer, and a chat template equal to the one that was learned."""
    config = json.loads(read_file(store, base, "config.json"))
    config.pop("torch_dtype", None)
    texts = {"config.json": json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True)}
    if template not in ("", "tokenizer"):
        texts["chat_template.jinja"] = load_template(template, Tokenizer.from_artifact(store, base)).jinja()
    blobs = {path: store.put_blob(text.encode()) for path, text in texts.items()}
    made = [File(path, blob.digest, blob.size) for path, blob in blobs.items()]
    return made + [f for f in base.files if ".safetensors" not in f.path and f.path not in texts]
