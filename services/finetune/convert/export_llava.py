"""EXPORT of LLaVA models to where others look for them: an adapter as XTuner's folders, a model in the official layout.

XTuner: llm_adapter/ and visual_encoder_adapter/ in PEFT's format, each on the part alone, and projector/. Its own export
knows no other language model than Llama; this one asks nothing of it, for it never leaves the parts' names.
Official (LlavaLlamaForCausalLM): the language model with `model.mm_projector.0` and `.2` in it, the tower as a folder of its
own, and mm_* keys in config.json. It is streamed, as every whole model.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from services.finetune.config import to_json
from services.finetune.convert.adapter import CONFIG, PREFIX, WEIGHTS
from services.finetune.convert.modules import as_modules
from services.finetune.convert.rest import rest_of
from services.finetune.convert.shards import Stored, order, plan, progress, shard_names
from services.finetune.convert.stream import Piece, Shard, Writer, cast, read_model, read_rows
from services.finetune.convert.towers import CLIP, PREPROCESSOR
from services.finetune.convert.towers import PREFIX as TOWER_PREFIX
from services.finetune.errors import FailedPrecondition
from services.finetune.modules import LANGUAGE, PROJECTOR, TOWER, is_llava
from services.finetune.orders import ExportTask
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import File, Manifest, load, read_file
from services.finetune.store.port import Store

REVISION = 1
"""Of the bytes that this code makes: files of an earlier attempt with another are made again."""
SHARD_BYTES = 5_000_000_000
VISION = "vision_tower"
"""The folder of the official layout's tower."""
_LINEAR = {"linear_1": "0", "linear_2": "2"}


# ---------------------------------------------------------------------------------------------- XTuner's folders


def xtuner_files(source: Manifest, attempt: Attempt, workdir: Path) -> list[File]:
    """The files of an adapter in XTuner's three folders. FailedPrecondition (MODEL_NOT_ADAPTER, ADAPTER_UNSUPPORTED)."""
    store = attempt.store
    if source.kind != "adapter" or "parts" not in source.meta:
        raise FailedPrecondition("only an adapter of a LLaVA model has XTuner's folders", reason="MODEL_NOT_ADAPTER")
    base = load(store, next(p.digest for p in source.parents if p.role == "base"))
    model, config = _json(store, base, "config.json"), _json(store, source, CONFIG)
    parts: dict[str, dict[str, Any]] = {"llm_adapter": {}, "visual_encoder_adapter": {}, "projector": {}}
    for tensor in read_model(store, source):
        folder, name = _place(tensor.name.removeprefix(PREFIX))
        parts[folder][name] = read_rows(store, tensor)
    found = []
    for folder, tensors in parts.items():
        if not tensors:
            continue
        about = _projector_config(model) if folder == "projector" else _adapter_config(config, tensors)
        weights, said = ("model.safetensors", "config.json") if folder == "projector" else (WEIGHTS, CONFIG)
        path = workdir / f"{folder}.safetensors"
        _save(tensors, path)
        text = json.dumps(about, indent=1, sort_keys=True).encode()
        for name, blob in ((weights, store.put_file(path)), (said, store.put_blob(text))):
            found.append(File(f"{folder}/{name}", blob.digest, blob.size))
    return found


def _place(name: str) -> tuple[str, str]:
    """The folder of an adapter's tensor, and its name there. FailedPrecondition (ADAPTER_UNSUPPORTED)."""
    if name.startswith(PROJECTOR):
        module, _, leaf = name.removeprefix(PROJECTOR).partition(".")
        return "projector", f"model.{_LINEAR[module]}.{leaf}"
    if ".lora_" in name and name.startswith(LANGUAGE):
        return "llm_adapter", f"{PREFIX}model.{name.removeprefix(LANGUAGE)}"
    if ".lora_" in name and name.startswith(TOWER):
        return "visual_encoder_adapter", f"{PREFIX}{TOWER_PREFIX}{name.removeprefix(TOWER)}"
    raise FailedPrecondition(
        f"the adapter holds {name} whole, which XTuner's folders have no place for: merge it and export the model",
        reason="ADAPTER_UNSUPPORTED",
    )


def _adapter_config(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The config of one part's adapter: its own rank and alpha, its own targets. FailedPrecondition
    (ADAPTER_UNSUPPORTED)."""
    from services.finetune.convert.lora import by_pattern

    modules = sorted({name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors})
    said = {
        (by_pattern(config.get("rank_pattern"), place, config["r"]),
         by_pattern(config.get("alpha_pattern"), place, config["lora_alpha"]))
        for place in map(_whole_name, modules)
    }  # fmt: skip
    if len(said) != 1:
        raise FailedPrecondition(
            "the adapter has different ranks in one part, which its folder's config cannot say",
            reason="ADAPTER_UNSUPPORTED",
        )
    rank, alpha = said.pop()
    kept = {k: v for k, v in config.items() if k not in ("rank_pattern", "alpha_pattern", "modules_to_save")}
    kept |= {"r": rank, "lora_alpha": alpha, "base_model_name_or_path": ""}
    return kept | {"target_modules": sorted({m.rpartition(".")[2] for m in modules})}


def _whole_name(module: str) -> str:
    """A part's module in the whole model, whose names the patterns are about."""
    if module.startswith(TOWER_PREFIX):
        return TOWER + module.removeprefix(TOWER_PREFIX)
    return LANGUAGE + module.removeprefix("model.")


def _projector_config(model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "projector",
        "architectures": ["ProjectorModel"],
        "visual_hidden_size": model["vision_config"]["hidden_size"],
        "llm_hidden_size": model["text_config"]["hidden_size"],
        "depth": 2,
        "hidden_act": "gelu",
        "bias": True,
    }


def _save(tensors: Mapping[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------- official layout


def official_files(task: ExportTask, source: Manifest, attempt: Attempt, stop: threading.Event) -> list[File]:
    """The files of a LLaVA model in the official layout. FailedPrecondition (ARCHITECTURE_UNSUPPORTED)."""
    store = attempt.store
    config = _json(store, source, "config.json")
    if not is_llava(config) or config["text_config"].get("model_type") != "llama":
        raise FailedPrecondition(
            "the official layout is LlavaLlamaForCausalLM: only LLaVA models with a Llama in them have it",
            reason="ARCHITECTURE_UNSUPPORTED",
        )
    if config["vision_config"].get("model_type") != CLIP:
        raise FailedPrecondition("the official layout has CLIP towers alone", reason="ARCHITECTURE_UNSUPPORTED")
    stored = read_model(store, source)
    sources = {_official(k.name): own for own, k in zip(stored, as_modules(stored, config), strict=True)}
    made = [own.named(name) for name, own in sources.items()]
    tower = [t for t in made if t.name.startswith(TOWER_PREFIX)]
    planned = plan((t for t in made if not t.name.startswith(TOWER_PREFIX)), SHARD_BYTES)
    whole = [Shard(n, tuple(order(held))) for n, held in zip(shard_names(len(planned)), planned, strict=True)]

    def pieces(tensor: Stored) -> Iterable[Piece]:
        return cast(store, sources[tensor.name], tensor)

    files: list[File] = []
    # Each with an index of its own, if it has one.
    for shards in (whole, [Shard(f"{VISION}/model.safetensors", tuple(order(tower)))]):
        mark = json.dumps([REVISION, to_json(task), torch.__version__], sort_keys=True)
        files += Writer(attempt, mark, progress(attempt, stop)).write(shards, pieces)
    return files + _texts(store, source, config)


def _official(name: str) -> str:
    if name.startswith(PROJECTOR):
        module, _, leaf = name.removeprefix(PROJECTOR).partition(".")
        return f"model.mm_projector.{_LINEAR[module]}.{leaf}"
    if name.startswith(TOWER):
        return TOWER_PREFIX + name.removeprefix(TOWER)
    return "model." + name.removeprefix(LANGUAGE) if name.startswith(LANGUAGE) else name


def _texts(store: Store, source: Manifest, config: Mapping[str, Any]) -> list[File]:
    """config.json of the whole, the tower's own, and what goes along unchanged."""
    preprocessor = _json(store, source, PREPROCESSOR)
    vision = {**config["vision_config"], "architectures": ["CLIPVisionModel"], "dtype": config["dtype"]}
    whole = {
        **config["text_config"],
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "dtype": config["dtype"],
        "torch_dtype": config["dtype"],
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "mm_vision_tower": VISION,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config["vision_config"]["hidden_size"],
        "mm_vision_select_layer": config["vision_feature_layer"],
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad" if preprocessor.get("do_pad") else "square",
    }
    clip = {k: v for k, v in preprocessor.items() if k not in ("processor_class", "do_pad")}
    texts = {
        "config.json": whole,
        f"{VISION}/config.json": vision,
        f"{VISION}/{PREPROCESSOR}": {**clip, "image_processor_type": "CLIPImageProcessor"},
    }
    kept = [f for f in rest_of(source) if f.path not in ("config.json", PREPROCESSOR, "processor_config.json")]
    for path, data in texts.items():
        blob = store.put_blob(json.dumps(data, indent=2, sort_keys=True).encode())
        kept.append(File(path, blob.digest, blob.size))
    return kept


def _json(store: Store, manifest: Manifest, path: str) -> dict[str, Any]:
    return dict(json.loads(read_file(store, manifest, path)))
