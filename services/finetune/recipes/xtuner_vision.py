"""XTuner's LLaVA to ours: a language model, a vision tower and a projector, each frozen, adapted or trained whole."""

from __future__ import annotations

from pathlib import PurePosixPath

from services.finetune.recipes.xtuner_model import LoraPart, read_lora, read_processor, read_weights
from services.finetune.recipes.xtuner_parts import Part

PROJECTOR = "multi_modal_projector"
LANGUAGE, TOWER = "*language_model.*", "*vision_tower.*"
"""Patterns of all that is in a part of the model."""


def read_sight(model: Part) -> Part | None:
    """LLaVAModel's parts; its llm."""
    llm, tower = model.part("llm"), model.part("visual_encoder")
    if llm is None or tower is None:
        model.blame("llm" if llm is None else "visual_encoder", "is missing")
        return None
    model.only("visual_select_layer", -2)
    model.only("projector_depth", 2)
    model.set("vision.pretrained", model.text("pretrained_pth"))
    kind = tower.kind()
    if kind not in ("CLIPVisionModel", "SiglipVisionModel", "Dinov2Model", "AutoModel"):
        tower.blame("type", "can only be the from_pretrained of CLIPVisionModel, SiglipVisionModel or Dinov2Model")
    model.set("vision.tower", tower.text("pretrained_model_name_or_path"))
    tower.idle("torch_dtype", "trust_remote_code")
    tower.close()
    of_llm, of_tower = (_lora(model, name) for name in ("llm_lora", "visual_encoder_lora"))
    whole = of_llm is None and not model.flag("freeze_llm", False)
    see = of_tower is None and not model.flag("freeze_visual_encoder", False)
    model.seen |= {"freeze_llm", "freeze_visual_encoder"}
    read_weights(llm, None, frozen=not whole)
    if whole and of_tower is None:
        model.set("method", "full")
        model.set("model.freeze", [] if see else ["vision_tower"])
    else:
        if whole:
            model.set("method", "lora")
        saved = [*(("language_model", "lm_head") if whole else ()), *(("vision_tower",) if see else ()), PROJECTOR]
        _adapt(model, of_llm, of_tower, saved)
    return llm


def _lora(model: Part, name: str) -> LoraPart | None:
    part = model.part(name)
    if part is None:
        return None
    found = read_lora(part)
    if found["targets"] or found["modules_to_save"]:
        model.blame(name, "can only train all linear layers: target_modules and modules_to_save must be left out")
    return found


def _adapt(model: Part, llm: LoraPart | None, tower: LoraPart | None, saved: list[str]) -> None:
    """One adapter for both: the tower's rank and alpha by pattern, where the language model has others."""
    first = llm or tower
    if first is not None:
        for key in ("rank", "alpha", "dropout", "use_rslora", "use_dora"):
            model.set(f"lora.{key}", first[key])
    if llm is not None and tower is not None:
        for key in ("dropout", "use_rslora", "use_dora"):
            if llm[key] != tower[key]:
                model.blame("visual_encoder_lora", f"must have the {key} of llm_lora")
        model.set("lora.rank_pattern", {TOWER: tower["rank"]} if tower["rank"] != llm["rank"] else {})
        model.set("lora.alpha_pattern", {TOWER: tower["alpha"]} if tower["alpha"] != llm["alpha"] else {})
    model.set("lora.targets", [p for p, part in ((LANGUAGE, llm), (TOWER, tower)) if part is not None])
    model.set("lora.modules_to_save", saved)


def read_shown(hook: Part) -> None:
    """EvaluateChatHook's image: it is asked about if it is one of the data's."""
    if (processor := hook.part("image_processor")) is not None:
        read_processor(processor)
    given = hook.take("evaluation_images")
    listed = [given] if isinstance(given, str) else list(given or [])
    folders = [PurePosixPath(s["images"]) for s in hook.reading.changes.get("data.sources", []) if s.get("images")]
    below = [_below(str(path), folders) for path in listed]
    if listed and all(below):
        hook.set("report.images", below)
    elif listed:
        hook.note("evaluation_images", "is not fetched: name images of the data by report.images")


def _below(path: str, folders: list[PurePosixPath]) -> str:
    plain = PurePosixPath(path)
    return next((str(plain.relative_to(f)) for f in folders if plain.is_relative_to(f)), "")
