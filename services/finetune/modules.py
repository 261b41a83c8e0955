"""Names of tensors: what files call them, and what the loaded model's modules are called, which is what adapters go by.

Of a language model both are one. A LLaVA model's files keep the names that its parts had before transformers 4.52:

    in files                               in memory
    language_model.model.X                 model.language_model.X
    language_model.lm_head.X               lm_head.X
    vision_tower.[vision_model.]X          model.vision_tower.X
    multi_modal_projector.X                model.multi_modal_projector.X

Files that use the names in memory are read too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

LLAVA = "LlavaForConditionalGeneration"
LANGUAGE, TOWER, PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."
"""How the names in memory of a LLaVA model's parts begin; its head is lm_head, as everywhere."""
FILE_LANGUAGE, FILE_TOWER, FILE_PROJECTOR = "language_model.", "vision_tower.vision_model.", "multi_modal_projector."
"""The same in files: what follows is the name that the tensor has in the part's own files."""

_FROM_FILE = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", LANGUAGE),
    (FILE_TOWER, TOWER),
    ("vision_tower.", TOWER),
    (FILE_PROJECTOR, PROJECTOR),
    # Adapters and files of some versions of transformers: the tower's inner name is in the module's.
    (f"{TOWER}vision_model.", TOWER),
)


def is_llava(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a LLaVA model's."""
    return config.get("model_type") == "llava"


def in_memory(name: str, config: Mapping[str, Any]) -> str:
    """The name in memory of a tensor or module that a model with this config.json has under `name` in its files."""
    if is_llava(config):
        for begin, becomes in _FROM_FILE:
            if name.startswith(begin):
                return becomes + name.removeprefix(begin)
    return name


def is_seeing(name: str) -> bool:
    """Whether what has this name, in memory or in files, is of a LLaVA model's tower or projector."""
    return name.removeprefix("model.").startswith(("vision_tower.", FILE_PROJECTOR))


def parts_of(adapter: Iterable[str]) -> set[str]:
    """Which parts of a LLaVA model an adapter with these tensors changes: language_model, vision_tower, projector."""
    kinds = {"vision_tower": "vision_tower", "multi_modal_projector": "projector"}
    return {next((part for word, part in kinds.items() if f".{word}." in name), "language_model") for name in adapter}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that is about the language model."""
    if not is_llava(config):
        return config
    inner = dict(config.get("text_config") or {})
    # Where the part does not say it, the whole does.
    return {**{k: config[k] for k in ("tie_word_embeddings",) if k in config}, **inner}


def auto_class(config: Mapping[str, Any]) -> str:
    """The name of transformers' class that loads such a model."""
    return "AutoModelForImageTextToText" if is_llava(config) else "AutoModelForCausalLM"
