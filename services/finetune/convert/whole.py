"""ADAPTER of a checkpoint that was trained whole: a model of kind MERGED, its base with the trained weights in it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path

from services.finetune.config import AdapterTask, ArtifactRef
from services.finetune.convert.adapter import base_tensors
from services.finetune.convert.shards import Stored, cast_bytes, plan, progress, read_file_header, read_folder, write
from services.finetune.errors import InvalidArgument
from services.finetune.prepare.certificate import META, carried
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, Parent, load, materialise, publish, read_file
from services.finetune.store.port import Store
from services.finetune.templates import load_template
from services.finetune.tokenizer import FILES as TOKENIZER_FILES
from services.finetune.tokenizer import Tokenizer


def make_whole(
    task: AdapterTask, named: ArtifactRef, checkpoint: Manifest, attempt: Attempt, stop: threading.Event, workdir: Path
) -> str:
    """The digest of a "merged" artifact made of one of our checkpoints. No more than a tensor is in memory.

    InvalidArgument (CHECKPOINT_INCOMPLETE), Cancelled (STOPPED).
    """
    store = attempt.store
    base_ref = next(p for p in checkpoint.parents if p.role == "base")
    base = load(store, base_ref.digest)
    sources = _sources(store, checkpoint, base, workdir)
    out = workdir / "model"
    out.mkdir()
    targets = [tensor.cast(task.dtype) for tensor in sources.values()]
    total, done, tell = sum(t.nbytes for t in targets), 0, progress(attempt, stop)

    def data(target: Stored) -> Iterable[bytes | memoryview]:
        return cast_bytes(sources[target.name], task.dtype)

    def count(target: Stored) -> None:
        nonlocal done
        done += target.nbytes
        tell(done, total)

    tell(0, total)
    write(out, plan(targets, task.max_shard_size_bytes), data, count)
    _write_rest(store, base, checkpoint.meta["template"], task.dtype, workdir, out)
    made = {path.name: store.put_file(path) for path in sorted(out.iterdir())}
    files = [File(name, blob.digest, blob.size) for name, blob in made.items()]
    files += [f for f in base.files if ".safetensors" not in f.path and f.path not in made]
    parents = (*checkpoint.parents, Parent("checkpoint", named.digest, named.name))
    # A certificate of the base's own speaks of the template that the base was tuned with.
    meta = {k: v for k, v in base.meta.items() if k != META} | carried(checkpoint.meta)
    meta |= {k: checkpoint.meta[k] for k in ("template", "system", "base_name")}
    meta["dtype"] = task.dtype
    return publish(store, Manifest("merged", tuple(sorted(files, key=lambda f: f.path)), parents, meta))


def _sources(store: Store, checkpoint: Manifest, base: Manifest, workdir: Path) -> dict[str, Stored]:
    """Where each tensor of the model comes from, under the names of the base's files: trained, or else the base's."""
    weights = [f.path for f in checkpoint.files if f.path.startswith("model") and f.path.endswith(".safetensors")]
    folder = materialise(store, checkpoint, workdir / "checkpoint", (*weights, "state.json"))
    tied = json.loads((folder / "state.json").read_text())["tied"]
    stored = {t.name: t for t in base_tensors(store, base)}

    def own(name: str) -> str:
        # Files of some models have no name for the whole, which transformers gives it.
        return name if name in stored else name.partition(".")[2]

    trained = {own(t.name): t for path in weights for t in read_file_header(folder / path)}
    for name, tensor in trained.items():
        if name not in stored or stored[name].shape != tensor.shape:
            raise InvalidArgument(
                f"the base has no {tensor.name} {list(tensor.shape)}; train again or take another checkpoint",
                reason="CHECKPOINT_INCOMPLETE",
                metadata={"tensor": tensor.name},
            )
    other_names = {own(name) for name in tied}
    if stored.keys() - trained.keys() - other_names:
        kept = [f.path for f in base.files if ".safetensors" in f.path]
        stored = {t.name: t for t in read_folder(materialise(store, base, workdir / "base", tuple(kept)))}
    left = {name: t for name, t in stored.items() if name not in other_names}
    return {name: trained[name].named(name) if name in trained else t for name, t in left.items()}


def _write_rest(store: Store, base: Manifest, template: str, dtype: str, workdir: Path, out: Path) -> None:
    """The config, and a chat template equal to the one that was learned."""
    config = json.loads(read_file(store, base, "config.json"))
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True))
    if template not in ("", "tokenizer"):
        folder = materialise(store, base, workdir / "tokenizer", TOKENIZER_FILES)
        (out / "chat_template.jinja").write_text(load_template(template, Tokenizer.from_files(folder)).jinja())
