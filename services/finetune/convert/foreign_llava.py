"""ADAPTER of XTuner's LLaVA checkpoints: what was trained of language model, vision tower and projector becomes one PEFT
adapter of the assembled model.

    iter_N.pth (mmengine's, or DeepSpeed's)          folders                       becomes
    llm.base_model.model.X.lora_A                    llm_adapter/                  LoRA on the language model
    llm.X                                            -                             all of it, in modules_to_save
    visual_encoder.base_model.model.X.lora_A         visual_encoder_adapter/       LoRA on the tower
    visual_encoder.X                                 visual_encoder/               all of it, in modules_to_save
    projector.model.0, projector.model.2             projector/                    the projector, in modules_to_save

The two LoRAs have ranks and alphas of their own, which become patterns.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.convert.adapter import (
    PREFIX,
    WEIGHTS,
    check_against,
    check_beside_pairs,
    check_pairs,
    store_files,
)
from services.finetune.convert.checkpoints import Trained, read_checkpoint, read_part_settings, read_settings
from services.finetune.convert.families import heads_of, native_parts
from services.finetune.convert.foreign import check_trained, family_of_modules, incomplete, native_pairs, pairs_of
from services.finetune.convert.pickles import read_tensors
from services.finetune.convert.shards import Stored, as_torch, read_folder, weight_files
from services.finetune.convert.stream import read_rows
from services.finetune.errors import InvalidArgument
from services.finetune.modules import LANGUAGE, PROJECTOR, TOWER, text_config
from services.finetune.orders import AdapterTask, ArtifactRef
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File

LLM, VISION = "llm", "visual_encoder"
FOLDERS = {"llm_adapter": f"{LLM}.", "visual_encoder_adapter": f"{VISION}.", "projector": "projector.",
           "visual_encoder": f"{VISION}."}  # fmt: skip
"""What pth_to_hf writes, and how the names of its tensors begin in a checkpoint."""
_MODULES = {"projector.model.0.": f"{PROJECTOR}linear_1.", "projector.model.2.": f"{PROJECTOR}linear_2."}
_GROWING = ("model.embed_tokens.weight", "lm_head.weight")

Weights = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """What is in an upload: tensors by the names of a checkpoint, the config's text, and LoRA's settings by part."""

    tensors: dict[str, Stored]
    config: str
    settings: Mapping[str, Mapping[str, Any]]


def is_folders(folder: Path) -> bool:
    """Whether an upload is what pth_to_hf writes of a LLaVA checkpoint."""
    return any((_inside(folder) / name).is_dir() for name in FOLDERS)


def _inside(folder: Path) -> Path:
    """An upload of a folder has all its files below that folder's name."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() and inside[0].name not in FOLDERS else folder


def read_source(folder: Path, stop: threading.Event) -> Source:
    """InvalidArgument as read_checkpoint, read_tensors and read_folder."""
    if not is_folders(folder):
        trained: Trained = read_checkpoint(folder, stop)
        names = {_strip(name): tensor for name, tensor in trained.tensors.items()}
        return Source(names, trained.config, read_part_settings(trained.config))
    folder = _inside(folder)
    tensors, settings = dict[str, Stored](), dict[str, Mapping[str, Any]]()
    for name, begin in FOLDERS.items():
        if (folder / name).is_dir():
            tensors |= {begin + key: tensor for key, tensor in _read_part(folder / name, stop).items()}
            about = folder / name / "adapter_config.json"
            if about.is_file():
                settings[begin.removesuffix(".")] = _settings(about)
    config = folder / "xtuner_config.py"
    return Source(tensors, config.read_text("utf-8", "replace") if config.is_file() else "", settings)


def _read_part(folder: Path, stop: threading.Event) -> dict[str, Stored]:
    adapter = folder / WEIGHTS
    if adapter.is_file():
        from services.finetune.convert.shards import read_file_header

        return {t.name: t for t in read_file_header(adapter)}
    if weight_files(folder):
        return {t.name: t for t in read_folder(folder)}
    found: dict[str, Stored] = {}
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pth", ".pt")):
        found |= read_tensors(path, stop)
    return found


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidArgument(
            f"{path.parent.name}/{path.name} is no JSON object", reason="ADAPTER_UNSUPPORTED"
        ) from error


def _strip(name: str) -> str:
    return name.removeprefix("module.")


def adapter_files(
    task: AdapterTask,
    source: Source,
    base: list[Stored],
    config: Mapping[str, Any],
    base_ref: ArtifactRef,
    attempt: Attempt,
    workdir: Path,
) -> tuple[list[File], Weights, str]:
    """(the adapter's files, its tensors, XTuner's name of its template); `base` has names in memory.

    InvalidArgument (ADAPTER_INCOMPLETE, ADAPTER_UNSUPPORTED, ADAPTER_MISMATCH, LORA_ALPHA_UNKNOWN).
    """
    made = _Made(task, source, base, config, attempt)
    weights = made.weights()
    about = made.config() | {"base_model_name_or_path": base_ref.name}
    pairs = check_beside_pairs(weights, about, base)
    if pairs:
        check_pairs(pairs, 0)
        check_against(pairs, about, base)
        check_trained(pairs)
    for name, value in weights.items():
        if not value.isfinite().all():
            raise incomplete(f"{name} has numbers that are not finite: the training failed", name)
    files = store_files(attempt.store, weights, about, task.dtype, workdir)
    done = next(f.size for f in files if f.path == WEIGHTS)
    attempt.emit("progress", done_bytes=done, total_bytes=done)
    return files, weights, read_settings(source.config).template


class _Made:
    """The one adapter of a checkpoint's parts."""

    def __init__(
        self, task: AdapterTask, source: Source, base: list[Stored], config: Mapping[str, Any], attempt: Attempt
    ) -> None:
        self._task, self._source, self._attempt = task, source, attempt
        self._base = {t.name: t for t in base}
        self._heads = heads_of(dict(text_config(config)))
        self._saved: list[str] = []
        self._ranks: dict[str, int] = {}
        self._targets: list[str] = []

    def weights(self) -> Weights:
        """Every tensor under PEFT's name."""
        parts: dict[str, dict[str, Stored]] = {LLM: {}, VISION: {}, "projector": {}}
        for name, tensor in self._source.tensors.items():
            part = name.partition(".")[0]
            if part not in parts:
                raise _odd(name)
            parts[part][name.removeprefix(part + ".")] = tensor
        found: Weights = {}
        for name, tensor in parts["projector"].items():
            begin = next((b for b in _MODULES if f"projector.{name}".startswith(b)), "")
            if not begin:
                raise _odd(f"projector.{name}")
            leaf = f"projector.{name}".removeprefix(begin)
            found[f"{PREFIX}{_MODULES[begin]}{leaf}"] = as_torch(tensor).float()
        if parts["projector"]:
            self._saved.append(PROJECTOR.removesuffix("."))
        return found | self._part(LLM, parts[LLM], LANGUAGE) | self._part(VISION, parts[VISION], TOWER)

    def _part(self, part: str, tensors: dict[str, Stored], begin: str) -> Weights:
        """The language model's, or the tower's."""
        if not tensors:
            return {}
        own = self._own_names(part)
        pairs, rest = pairs_of(tensors) if any(".lora_" in name for name in tensors) else ({}, list(tensors))
        if pairs and rest:
            raise _odd(f"{part}.{rest[0]}")
        if not pairs:
            return self._whole(part, tensors, own, begin)
        if part == VISION:
            pairs = {_tower_name(module): pair for module, pair in pairs.items()}
        made = native_pairs(pairs, own, self._heads)
        found = {PREFIX + _in_memory(n.removeprefix(PREFIX), begin): value for n, value in made.items()}
        ranks = {v.shape[0] for n, v in found.items() if ".lora_A." in n}
        if len(ranks) != 1:
            raise incomplete(f"the LoRA of {part} has ranks {sorted(ranks)}, and no one rank", "")
        self._ranks[part] = ranks.pop()
        self._targets += sorted({n.removeprefix(PREFIX).partition(".lora_")[0] for n in found})
        return found

    def _own_names(self, part: str) -> dict[str, Stored]:
        """The base's tensors of a part, under the names that they have in the part alone."""
        if part == VISION:
            return {n.removeprefix(TOWER): t for n, t in self._base.items() if n.startswith(TOWER)}
        language = {"model." + n.removeprefix(LANGUAGE): t for n, t in self._base.items() if n.startswith(LANGUAGE)}
        return language | {n: t for n, t in self._base.items() if n.startswith("lm_head.")}

    def _whole(self, part: str, tensors: dict[str, Stored], own: dict[str, Stored], begin: str) -> Weights:
        """A part that was trained as it is."""
        if part == VISION:
            tensors = {_tower_name(n): t for n, t in tensors.items() if not n.endswith("position_ids")}
            tensors = {n: t for n, t in tensors.items() if n in own or not n.startswith("head.")}
        modules = [n.removesuffix(".weight") for n in tensors if n.endswith(".weight")]
        family = family_of_modules([m for m in modules if m != "lm_head"], own)
        found: Weights = {}
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            for native in native_parts(family, module) if family else ():
                value = as_torch(tensor).float()
                place = f"{native.module}.{leaf}"
                found[place] = native.rows(value, self._heads).contiguous() if native.rows else value
            if family is None:
                found[name] = as_torch(tensor).float()
        if "lm_head.weight" not in own:
            found.pop("lm_head.weight", None)  # it is the embedding again
        self._saved.append(begin.removesuffix("."))
        self._saved += ["lm_head"] if any(n.startswith("lm_head.") for n in found) else []
        return {PREFIX + _in_memory(n, begin): self._grown(n, value, own) for n, value in found.items()}

    def _grown(self, name: str, value: Any, own: Mapping[str, Stored]) -> Any:
        """An embedding or a head with the rows that it got when the model was assembled."""
        import torch

        base = own.get(name)
        if name not in _GROWING or base is None or len(value) >= base.shape[0]:
            return value
        return torch.cat([value, read_rows(self._attempt.store, base, len(value)).float()])

    # ------------------------------------------------------------------------------------------ config

    def config(self) -> dict[str, Any]:
        """adapter_config.json. InvalidArgument (LORA_ALPHA_UNKNOWN, ADAPTER_UNSUPPORTED)."""
        alphas = {part: self._alpha(part) for part in self._ranks}
        first = LLM if LLM in self._ranks else next(iter(self._ranks), "")
        patterns = {}
        if len(self._ranks) == 2:
            place = r"model\.vision_tower\..*"
            patterns = {"rank_pattern": {place: self._ranks[VISION]}, "alpha_pattern": {place: alphas[VISION]}}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self._ranks.get(first, 8),
            "lora_alpha": alphas.get(first, 8),
            "lora_dropout": float(self._source.settings.get(first, {}).get("lora_dropout") or 0),
            # PEFT's name for none.
            "target_modules": self._targets or "dummy-target-modules",
            "modules_to_save": self._saved or None,
            "bias": "none",
            "fan_in_fan_out": False,
            "use_rslora": any(s.get("use_rslora") for s in self._source.settings.values()),
            "inference_mode": True,
            **patterns,
        }

    def _alpha(self, part: str) -> float:
        given = self._source.settings.get(part, {})
        odd = [k for k in ("use_dora", "modules_to_save") if given.get(k)]
        if odd or given.get("bias", "none") != "none":
            raise InvalidArgument(
                f"only plain LoRA can be used, and {part} has {', '.join(odd) or 'bias'}", reason="ADAPTER_UNSUPPORTED"
            )
        alpha = (self._task.lora_alpha if part == LLM or len(self._ranks) == 1 else 0) or given.get("lora_alpha")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < 1e9:
            raise InvalidArgument(
                f"the checkpoint does not say the lora_alpha of {part}; give the config that it was trained by",
                reason="LORA_ALPHA_UNKNOWN",
            )
        return alpha


def _tower_name(name: str) -> str:
    return name.removeprefix("vision_model.")


def _in_memory(name: str, begin: str) -> str:
    """A part's own name, in the whole."""
    if begin == LANGUAGE:
        return name if name.startswith("lm_head") else begin + name.removeprefix("model.")
    return begin + name


def _odd(name: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name} is no tensor of a LLaVA checkpoint: those of llm, visual_encoder and projector are read",
        reason="ADAPTER_UNSUPPORTED",
        metadata={"tensor": name},
    )
