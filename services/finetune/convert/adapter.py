"""ADAPTER: a training checkpoint becomes a PEFT adapter that describes itself, or a model where all of it was trained."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.finetune.convert.modules import as_modules
from services.finetune.convert.shards import DTYPES, NAMES, WIDTHS, Stored, order, parse_header, raw, recast, write_file
from services.finetune.errors import Cancelled, FailedPrecondition, InvalidArgument
from services.finetune.modules import LLAVA, parts_of
from services.finetune.orders import AdapterTask, ArtifactRef
from services.finetune.prepare.certificate import carried
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, Parent, load, materialise, publish, read_file
from services.finetune.store.port import Store
from services.finetune.tokenizer import FILES as TOKENIZER_FILES

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT writes before the base's own names."""
MAGNITUDE = ".lora_magnitude_vector"
"""What PEFT calls DoRA's lengths of a module's rows."""


def make_adapter(task: AdapterTask, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    """Do an AdapterTask; the digest of an "adapter" artifact, or of a "merged" one. Its tokenizer files are the base's own
    blobs.

    InvalidArgument (DTYPE_UNKNOWN, TASK_MISSING, ADAPTER_INCOMPLETE, ADAPTER_UNSUPPORTED), FailedPrecondition
    (NOT_A_CHECKPOINT), Cancelled (STOPPED); for another trainer's checkpoint those of foreign.make_foreign too.
    """
    if task.dtype not in DTYPES:
        raise InvalidArgument(f"unknown dtype {task.dtype!r}; use {', '.join(DTYPES)}", reason="DTYPE_UNKNOWN")
    if task.checkpoint is not None:
        return _make_own(task, task.checkpoint, attempt, stop, workdir)
    if task.source is None or task.base is None:
        raise InvalidArgument("an adapter needs a checkpoint, or a source and its base", reason="TASK_MISSING")
    from services.finetune.convert.foreign import make_foreign

    return make_foreign(task, task.source, task.base, attempt, stop, workdir)


def _make_own(task: AdapterTask, named: ArtifactRef, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    """Without torch, whose start takes longer than all of this: a new adapter is waited for."""
    store = attempt.store
    checkpoint = load(store, named.digest)
    if checkpoint.kind != "checkpoint":
        raise FailedPrecondition(f"{named.name} is no checkpoint", reason="NOT_A_CHECKPOINT")
    if checkpoint.meta["method"] == "full":
        from services.finetune.convert.whole import make_whole

        return make_whole(task, named, checkpoint, attempt, stop)
    tensors, config = _own_tensors(store, checkpoint), json.loads(read_file(store, checkpoint, CONFIG))
    base_parent = next(p for p in checkpoint.parents if p.role == "base")
    base = load(store, base_parent.digest)
    stored = base_tensors(store, base)
    pairs = check_beside_pairs(tensors, config, stored)
    if pairs or not tensors:
        check_pairs(pairs, 0 if config.get("rank_pattern") else int(config["r"]))
    check_against(pairs, config, stored)
    if stop.is_set():
        raise Cancelled("stopped before anything was kept", reason="STOPPED")
    config.update(base_model_name_or_path=base_parent.name, inference_mode=True)
    weights = _cast_weights(store, checkpoint, tensors, task.dtype, workdir)
    attempt.emit("progress", done_bytes=weights.size, total_bytes=weights.size)
    files = [weights, _store_config(store, config)]
    files += [f for f in base.files if f.path in TOKENIZER_FILES]
    parents = (*checkpoint.parents, Parent("checkpoint", named.digest, named.name))
    meta = {
        **{k: checkpoint.meta[k] for k in ("architecture", "template", "system", "base_name")},
        **carried(checkpoint.meta),
        "generation": base.meta["generation"],
        "context_length": base.meta["context_length"],
        "dtype": task.dtype,
        "parameters": sum(t.count for t in tensors.values()),
        **parts_meta(base, tensors),
    }
    return publish(store, Manifest("adapter", tuple(sorted(files, key=lambda f: f.path)), parents, meta))


def _own_tensors(store: Store, checkpoint: Manifest) -> dict[str, Stored]:
    """The tensors of a checkpoint's adapter by its header. InvalidArgument (WEIGHTS_MALFORMED, ADAPTER_INCOMPLETE)."""
    file = checkpoint.file(WEIGHTS)
    found = {t.name: t for t in parse_header(functools.partial(_read, store, file.digest), WEIGHTS)}
    for name, tensor in found.items():
        whole = tensor.dtype in NAMES and tensor.nbytes == tensor.count * WIDTHS[tensor.dtype]
        if not whole or tensor.start + tensor.nbytes > file.size:
            raise _incomplete(f"{name} is no whole tensor of {', '.join(DTYPES)}", name)
    return found


def _cast_weights(store: Store, checkpoint: Manifest, tensors: Mapping[str, Stored], dtype: str, workdir: Path) -> File:
    """The file of these tensors in `dtype`: the checkpoint's own where they have it already."""
    cast = order(t.cast(dtype) for t in tensors.values())
    if all(t.dtype == tensors[t.name].dtype for t in cast):
        return checkpoint.file(WEIGHTS)
    source = materialise(store, checkpoint, workdir / "checkpoint", (WEIGHTS,)) / WEIGHTS

    def data(tensor: Stored) -> Iterable[bytes]:
        own = replace(tensors[tensor.name], file=source)
        return [recast(b"".join(raw(own)), own.dtype, tensor.dtype)]

    write_file(workdir / WEIGHTS, cast, data, lambda tensor: None)
    blob = store.put_file(workdir / WEIGHTS)
    return File(WEIGHTS, blob.digest, blob.size)


def parts_meta(base: Manifest, names: Iterable[str]) -> dict[str, list[str]]:
    """Of an adapter of a LLaVA model: which parts it changes, by which it is told what can serve it."""
    return {"parts": sorted(parts_of(names))} if base.meta["architecture"] == LLAVA else {}


def store_files(
    store: Store, tensors: Mapping[str, Any], config: Mapping[str, Any], dtype: str, workdir: Path
) -> list[File]:
    import torch
    from safetensors.torch import save_file

    cast = {k: v.to(getattr(torch, dtype)).contiguous() for k, v in tensors.items()}
    save_file(cast, workdir / WEIGHTS, metadata={"format": "pt"})
    weights = store.put_file(workdir / WEIGHTS)
    return [File(WEIGHTS, weights.digest, weights.size), _store_config(store, config)]


def _store_config(store: Store, config: Mapping[str, Any]) -> File:
    about = store.put_blob(json.dumps(config, sort_keys=True, indent=1, ensure_ascii=False).encode())
    return File(CONFIG, about.digest, about.size)


def base_tensors(store: Store, base: Manifest) -> list[Stored]:
    """The base's tensors by the headers of its files, under their names in memory: a few kilobytes are read, whatever the
    model's size."""
    found: list[Stored] = []
    for file in base.files:
        if file.path.endswith(".safetensors"):
            tensors = parse_header(functools.partial(_read, store, file.digest), file.path)
            found += [replace(t, blob=file.digest) for t in tensors]
    return as_modules(found, json.loads(read_file(store, base, "config.json")))


def _read(store: Store, digest: str, offset: int, length: int) -> bytes:
    return b"".join(store.read_blob(digest, offset, length))


def check_beside_pairs(tensors: Mapping[str, Any], config: Mapping[str, Any], base: Sequence[Stored]) -> dict[str, Any]:
    """The LoRA halves among an adapter's tensors, once what else it holds is found whole: the lengths that DoRA trains, and
    modules that were trained as they are. InvalidArgument (ADAPTER_INCOMPLETE)."""
    pairs = {name: value for name, value in tensors.items() if ".lora_A." in name or ".lora_B." in name}
    lengths = {name for name in tensors if name.endswith(MAGNITUDE)}
    wanted = (
        {a.replace(".lora_A.weight", MAGNITUDE) for a in pairs if ".lora_A." in a} if config.get("use_dora") else set()
    )
    if odd := sorted(lengths ^ wanted):
        raise _incomplete(f"{odd[0]} is {'missing' if odd[0] in wanted else 'not DoRA'}", odd[0])
    saved = _saved(config)
    shapes = {PREFIX + t.name: t.shape for t in base}
    beside = {name: value for name, value in tensors.items() if name not in pairs and name not in lengths}
    for name, value in sorted(beside.items()):
        if not saved(name) or shapes.get(name, tuple(value.shape)) != tuple(value.shape):
            raise _incomplete(f"{name} {list(value.shape)} is no weight of modules_to_save", name)
    if gone := sorted(name for name in shapes if saved(name) and name not in beside):
        raise _incomplete(f"{gone[0]} is missing", gone[0])
    return pairs


def check_pairs(tensors: Mapping[str, Any], rank: int) -> None:
    """Every LoRA module needs its A and its B, of the config's rank (0 means any). InvalidArgument (ADAPTER_INCOMPLETE)
    naming the first that fails."""
    for name, value in sorted(tensors.items()):
        a = name.replace(".lora_B.", ".lora_A.")
        b = name.replace(".lora_A.", ".lora_B.")
        whole = a != b and a in tensors and b in tensors and len(tensors[a].shape) == len(tensors[b].shape) == 2
        if (
            not whole
            or tensors[a].shape[0] != tensors[b].shape[1]
            or tensors[a].shape[0] != (rank or tensors[a].shape[0])
        ):
            raise _incomplete(f"{name} {list(value.shape)} has no matching half of rank {rank or 'its own'}", name)
    if not tensors:
        raise _incomplete("the checkpoint holds no LoRA weights", "")


def check_against(tensors: Mapping[str, Any], config: Mapping[str, Any], base: Sequence[Stored]) -> None:
    """Each half fits its base weight, and no targeted weight is left out. InvalidArgument (ADAPTER_INCOMPLETE)."""
    targets = config.get("target_modules")
    saved = _saved(config)
    for weight in base:
        module = weight.name.removesuffix(".weight")
        if saved(weight.name):
            continue
        a, b = halves(module)
        if a in tensors:
            out, into = weight.shape[::-1] if config.get("fan_in_fan_out") else weight.shape
            if tensors[a].shape[1] != into or tensors[b].shape[0] != out:
                raise _incomplete(f"the adapter does not fit {weight.name} {list(weight.shape)}", weight.name)
        elif (
            isinstance(targets, list) and len(weight.shape) == 2 and {module, module.rpartition(".")[2]} & set(targets)
        ):
            raise _incomplete(f"the adapter targets {module} but has no weights for it", module)


def _saved(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a tensor is of modules_to_save, which names them in full or by the end of their names."""
    words = tuple(f".{module}." for module in config.get("modules_to_save") or ())
    return lambda name: any(word in f".{name}" for word in words)


def halves(module: str) -> tuple[str, str]:
    """The names of a base module's LoRA A and B in an adapter file."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def _incomplete(why: str, tensor: str) -> InvalidArgument:
    return InvalidArgument(
        f"{why}; train again or take another checkpoint", reason="ADAPTER_INCOMPLETE", metadata={"tensor": tensor}
    )
