"""ADAPTER of another trainer's checkpoint: a PEFT adapter, or a whole model where all of it was trained.

XTuner trains a family's own module names; the base was made native when it was imported. A LoRA's B has the rows of its
module's output, so an adapter of a fused module is taken apart exactly as the module was, and A goes to each part.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.finetune.convert.adapter import (
    PREFIX,
    WEIGHTS,
    base_tensors,
    check_against,
    check_pairs,
    halves,
    parts_meta,
    store_files,
)
from services.finetune.convert.checkpoints import Settings, Trained, read_checkpoint, read_settings
from services.finetune.convert.families import FAMILIES, Family, Heads, Part, heads_of, native_parts
from services.finetune.convert.native import write_native
from services.finetune.convert.rest import with_dtype
from services.finetune.convert.shards import Stored, as_torch, progress
from services.finetune.errors import Cancelled, FailedPrecondition, InvalidArgument
from services.finetune.modules import is_llava
from services.finetune.orders import AdapterTask, ArtifactRef
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, Parent, load, materialise, publish, read_file
from services.finetune.templates import TEMPLATES
from services.finetune.tokenizer import FILES as TOKENIZER_FILES


def make_foreign(
    task: AdapterTask,
    source: ArtifactRef,
    base_ref: ArtifactRef,
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
) -> str:
    """The digest of an "adapter" or a "merged" artifact made of the files of revision `source` and the model `base_ref`.

    InvalidArgument (CHECKPOINT_INCOMPLETE, CHECKPOINT_UNSUPPORTED, PICKLE_REFUSED, ADAPTER_INCOMPLETE,
    ADAPTER_UNSUPPORTED, ADAPTER_MISMATCH, LORA_ALPHA_UNKNOWN, WEIGHTS_INCOMPLETE), FailedPrecondition (MODEL_NOT_WHOLE),
    Cancelled (STOPPED).
    """
    base = load(attempt.store, base_ref.digest)
    if base.kind not in ("base", "merged"):
        raise FailedPrecondition(f"{base_ref.name} is no whole model", reason="MODEL_NOT_WHOLE")
    manifest = load(attempt.store, source.digest)
    config = json.loads(read_file(attempt.store, base, "config.json"))
    if is_llava(config):
        return _make_llava(task, (source, manifest), (base_ref, base), config, attempt, stop, workdir)
    trained = read_checkpoint(materialise(attempt.store, manifest, workdir / "source"), stop)
    settings = read_settings(trained.config)
    parents = [Parent("base", base_ref.digest, base_ref.name), Parent("source", source.digest, source.name)]
    tensors = {strip(name): tensor for name, tensor in trained.tensors.items()}
    stored = {t.name: t for t in base_tensors(attempt.store, base)}
    if any(".lora_" in name for name in tensors):
        pairs, odd = pairs_of(tensors)
        if odd:
            raise InvalidArgument(
                f"{odd[0]} is no LoRA weight: only plain LoRA adapters of a language model can be used",
                reason="ADAPTER_UNSUPPORTED",
                metadata={"tensor": odd[0]},
            )
        weights = native_pairs(pairs, stored, heads_of(config))
        files = _adapter_files(task, weights, settings, list(stored.values()), base_ref, attempt, workdir)
        kept = [f for f in base.files if f.path in TOKENIZER_FILES]
        kind, count = "adapter", sum(v.numel() for v in weights.values())
    else:
        files = _model_files(task, trained, tensors, stored, config, attempt, stop, workdir)
        kept = [f for f in base.files if ".safetensors" not in f.path and f.path != "config.json"]
        kind, count = "merged", sum(t.count for t in tensors.values())
    _check_going(stop)
    meta = _meta(task, base, base_ref, settings.template, count)
    every = tuple(sorted([*files, *kept], key=lambda f: f.path))
    return publish(attempt.store, Manifest(kind, every, tuple(parents), meta))  # type: ignore[arg-type]


def _make_llava(
    task: AdapterTask,
    source: tuple[ArtifactRef, Manifest],
    base: tuple[ArtifactRef, Manifest],
    config: Mapping[str, Any],
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
) -> str:
    """The digest of an adapter on a LLaVA model."""
    from services.finetune.convert import foreign_llava

    (source_ref, files), (base_ref, model) = source, base
    read = foreign_llava.read_source(materialise(attempt.store, files, workdir / "source"), stop)
    stored = base_tensors(attempt.store, model)
    made, weights, template = foreign_llava.adapter_files(task, read, stored, config, base_ref, attempt, workdir)
    _check_going(stop)
    made += [f for f in model.files if f.path in TOKENIZER_FILES]
    parents = (Parent("base", base_ref.digest, base_ref.name), Parent("source", source_ref.digest, source_ref.name))
    count = sum(v.numel() for v in weights.values())
    meta = _meta(task, model, base_ref, template, count) | parts_meta(model, weights)
    return publish(attempt.store, Manifest("adapter", tuple(sorted(made, key=lambda f: f.path)), parents, meta))


def _check_going(stop: threading.Event) -> None:
    if stop.is_set():
        raise Cancelled("stopped before anything was kept", reason="STOPPED")


def _meta(task: AdapterTask, base: Manifest, base_ref: ArtifactRef, template: str, count: int) -> dict[str, Any]:
    return {
        **{k: base.meta[k] for k in ("architecture", "system", "generation", "context_length")},
        "template": template if template in TEMPLATES else base.meta["template"],
        "base_name": base_ref.name,
        "dtype": task.dtype,
        "parameters": count,
    }


def strip(name: str) -> str:
    """A tensor's name without what the trainer's wrappers put before it."""
    for prefix in ("module.", "llm."):
        name = name.removeprefix(prefix)
    return name


# ---------------------------------------------------------------------------------------------- adapters

Pairs = dict[str, dict[str, Stored]]


def pairs_of(tensors: Mapping[str, Stored]) -> tuple[Pairs, list[str]]:
    """Each module's halves, "A" and "B", and the names that are none."""
    found: Pairs = {}
    odd: list[str] = []
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        half = rest.replace(".default", "")
        if half in ("A.weight", "B.weight") and len(tensor.shape) == 2:
            found.setdefault(module, {})[half[0]] = tensor
        else:
            odd.append(name)
    return found, odd


def native_pairs(pairs: Pairs, base: Mapping[str, Stored], heads: Heads) -> dict[str, Any]:
    """The adapter's tensors under PEFT's names of native modules. InvalidArgument (ADAPTER_INCOMPLETE,
    ADAPTER_MISMATCH)."""
    family = family_of_modules(list(pairs), base)
    made: dict[str, Any] = {}
    for module, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise incomplete(f"{module} has a lora_{next(iter(pair))} and no other half", module)
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise incomplete(f"{module} has halves of different ranks", module)
        a, b = as_torch(pair["A"]).float(), as_torch(pair["B"]).float()
        for part in native_parts(family, module) if family else (Part(module),):
            name_a, name_b = halves(part.module)
            try:
                made[name_a], made[name_b] = a.clone(), part.rows(b, heads).contiguous() if part.rows else b
            except RuntimeError as error:  # torch's, for a tensor that cannot be taken apart so
                raise incomplete(f"{module}'s lora_B {list(b.shape)} does not fit the base's heads", module) from error
    return made


def family_of_modules(modules: list[str], base: Mapping[str, Stored]) -> Family | None:
    """The family whose names the modules have, None for the base's own. InvalidArgument (ADAPTER_MISMATCH)."""
    for family in (None, *FAMILIES.values()):
        parts = [p.module for m in modules for p in (native_parts(family, m) if family else (Part(m),))]
        if all(f"{p}.weight" in base for p in parts):
            return family
    gone = next(m for m in modules if f"{m}.weight" not in base)
    raise InvalidArgument(
        f"the base has no module {gone}, under this name or a name that its family had; name the base that was trained",
        reason="ADAPTER_MISMATCH",
        metadata={"tensor": gone},
    )


def _adapter_files(
    task: AdapterTask,
    weights: Mapping[str, Any],
    settings: Settings,
    base: list[Stored],
    base_ref: ArtifactRef,
    attempt: Attempt,
    workdir: Path,
) -> list[File]:
    config = _adapter_config(task, weights, settings)
    check_pairs(weights, int(config["r"]))
    check_against(weights, config, base)
    check_trained(weights)
    config["base_model_name_or_path"] = base_ref.name
    files = store_files(attempt.store, weights, config, task.dtype, workdir)
    done = next(f.size for f in files if f.path == WEIGHTS)
    attempt.emit("progress", done_bytes=done, total_bytes=done)
    return files


def _adapter_config(task: AdapterTask, weights: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    given = settings.lora
    alpha = task.lora_alpha or given.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e9:
        raise InvalidArgument(
            "the checkpoint does not say its lora_alpha; give it, or the config that it was trained by",
            reason="LORA_ALPHA_UNKNOWN",
        )
    odd = [k for k in ("use_dora", "modules_to_save") if given.get(k)]
    if odd or given.get("bias", "none") != "none":
        raise InvalidArgument(
            f"only plain LoRA adapters can be used, not {', '.join(odd) or 'bias'}", reason="ADAPTER_UNSUPPORTED"
        )
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in weights}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": next(v.shape[0] for k, v in weights.items() if ".lora_A." in k),
        "lora_alpha": alpha,
        "lora_dropout": float(given.get("lora_dropout") or 0),
        "target_modules": sorted(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": bool(given.get("use_rslora")),
        "inference_mode": True,
    }


def check_trained(weights: Mapping[str, Any]) -> None:
    for name, value in weights.items():
        if not value.isfinite().all():
            raise incomplete(f"{name} has numbers that are not finite: the training failed", name)
    if not any(value.any() for name, value in weights.items() if ".lora_B." in name):
        raise incomplete("every lora_B is zero: nothing was trained", "")


def incomplete(why: str, tensor: str) -> InvalidArgument:
    return InvalidArgument(
        f"{why}; train again or take another checkpoint", reason="ADAPTER_INCOMPLETE", metadata={"tensor": tensor}
    )


# ---------------------------------------------------------------------------------------------- whole models


def _model_files(
    task: AdapterTask,
    trained: Trained,
    tensors: Mapping[str, Stored],
    base: Mapping[str, Stored],
    config: dict[str, Any],
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
) -> list[File]:
    """The weights of a model that was trained whole, and its config. InvalidArgument (WEIGHTS_INCOMPLETE)."""
    modules = [name.rpartition(".")[0] for name in tensors if name.endswith(".weight")]
    family = family_of_modules(modules, base)
    out = workdir / "model"
    out.mkdir()
    named = [t.named(name) for name, t in tensors.items()]
    write_native(family, config, named, out, task.dtype, task.max_shard_size_bytes, progress(attempt, stop))
    (out / "config.json").write_text(json.dumps(with_dtype(config, task.dtype), indent=2, sort_keys=True))
    found = []
    for path in sorted(out.iterdir()):
        blob = attempt.store.put_file(path)
        found.append(File(path.name, blob.digest, blob.size))
    return found
