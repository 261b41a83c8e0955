"""MERGE: W + scale * B A, tensor by tensor; what the adapter does not touch keeps its bytes.

Memory is about three copies in float32 of the largest tensor that the adapter touches, and the adapter itself.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from services.finetune.config import MergeTask
from services.finetune.convert.adapter import PREFIX, WEIGHTS, check_pairs, halves, read_config, scaling
from services.finetune.convert.shards import (
    DTYPES,
    NAMES,
    Stored,
    as_torch,
    cast_bytes,
    plan,
    progress,
    read_folder,
    to_bytes,
    write,
)
from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.prepare.certificate import META, carried
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import Manifest, Parent, load, materialise, publish_directory
from services.finetune.templates import load_template
from services.finetune.tokenizer import Tokenizer


def merge(task: MergeTask, attempt: Attempt, stop: threading.Event, workdir: Path) -> str:
    """Do a MergeTask; the digest of a "merged" artifact.

    InvalidArgument (DTYPE_UNKNOWN, SHARD_SIZE_INVALID, ADAPTER_MISMATCH, ADAPTER_UNSUPPORTED),
    FailedPrecondition (BASE_MISMATCH, MODEL_NOT_ADAPTER), Cancelled (STOPPED).
    """
    adapter, base = _check(task, attempt)
    lora = materialise(attempt.store, adapter, workdir / "adapter")
    folder = materialise(attempt.store, base, workdir / "base")
    out = workdir / "model"
    out.mkdir()
    merge_folder(folder, lora, out, task.dtype, task.max_shard_size_bytes, progress(attempt, stop))
    _copy_rest(folder, out, task.dtype, adapter.meta["template"])
    parents = [Parent("base", task.base.digest, task.base.name)]
    parents += [Parent("adapter", task.adapter.digest, task.adapter.name)]
    # A certificate of the base's own speaks of the template that the base was tuned with.
    meta = {k: v for k, v in base.meta.items() if k != META} | carried(adapter.meta)
    meta |= {k: adapter.meta[k] for k in ("template", "system", "base_name")}
    return publish_directory(attempt.store, "merged", out, parents, {**meta, "dtype": task.dtype or base.meta["dtype"]})


def _check(task: MergeTask, attempt: Attempt) -> tuple[Manifest, Manifest]:
    if task.dtype and task.dtype not in DTYPES:
        raise InvalidArgument(f"unknown dtype {task.dtype!r}; use {', '.join(DTYPES)}", reason="DTYPE_UNKNOWN")
    if task.max_shard_size_bytes <= 0:
        raise InvalidArgument("the largest shard must have some bytes", reason="SHARD_SIZE_INVALID")
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


def merge_folder(folder: Path, lora: Path, out: Path, dtype: str, limit: int, tell: Callable[[int, int], None]) -> None:
    """Write the merged weights of the base in `folder` and the adapter in `lora` into `out`.

    `dtype` "" keeps the base's. Sums are in float32 and rounded once. InvalidArgument (ADAPTER_MISMATCH).
    """
    config, pairs, base = read_config(lora), load_file(lora / WEIGHTS), read_folder(folder)
    check_pairs(pairs, int(config["r"]))
    _check_fit(pairs, config, base, json.loads((folder / "config.json").read_text()))
    stored = {t.name: t for t in base}
    total, done = sum(t.cast(dtype).nbytes for t in base), 0

    def data(tensor: Stored) -> Iterable[bytes | memoryview]:
        source = stored[tensor.name]
        a, b = halves(source.name.removesuffix(".weight"))
        if a not in pairs:
            return cast_bytes(source, dtype)
        wanted = getattr(torch, NAMES[tensor.dtype])
        return [to_bytes(_sum(as_torch(source), pairs[a], pairs[b], config).to(wanted))]

    def count(tensor: Stored) -> None:
        nonlocal done
        done += tensor.nbytes
        tell(done, total)

    tell(0, total)
    write(out, plan((t.cast(dtype) for t in base), limit), data, count)


def _sum(weight: Tensor, a: Tensor, b: Tensor, config: Mapping[str, Any]) -> Tensor:
    delta = b.float() @ a.float()
    delta *= scaling(config)
    return weight.float() + (delta.T if config.get("fan_in_fan_out") else delta)


def _check_fit(
    pairs: Mapping[str, Tensor], config: Mapping[str, Any], base: Sequence[Stored], model: Mapping[str, Any]
) -> None:
    """Every tensor of the adapter has a base weight of its shape."""
    shapes = {t.name: t.shape for t in base if t.dtype in NAMES}
    for name in sorted(pairs):
        module = name.removeprefix(PREFIX).rpartition(".lora_")[0]
        if model.get("tie_word_embeddings") and module.rpartition(".")[2] == "lm_head":
            raise _mismatch(name, "its target is tied to the embeddings, so merging it would change both")
        a, b = halves(module)
        shape = shapes.get(f"{module}.weight")
        if name not in (a, b) or shape is None:
            raise _mismatch(name, "the base has no weight for it")
        if (shape[::-1] if config.get("fan_in_fan_out") else shape) != (pairs[b].shape[0], pairs[a].shape[1]):
            raise _mismatch(name, f"the base's weight has shape {list(shape)}")


def _mismatch(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"the adapter's {name} cannot be merged: {why}", reason="ADAPTER_MISMATCH", metadata={"tensor": name}
    )


def _copy_rest(folder: Path, out: Path, dtype: str, template: str) -> None:
    """Config, tokenizer, and a chat template equal to the one the adapter was tuned with."""
    for path in folder.iterdir():
        if ".safetensors" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    if dtype:
        config: dict[str, Any] = json.loads((out / "config.json").read_text())
        config.pop("torch_dtype", None)
        (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2, sort_keys=True))
    if template not in ("", "tokenizer"):
        jinja = load_template(template, Tokenizer.from_files(out)).jinja()
        (out / "chat_template.jinja").write_text(jinja)
