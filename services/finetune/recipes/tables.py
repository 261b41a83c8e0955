"""The tables that recipes are made of, and what XTuner's words mean in ours."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from services.finetune.formats.pairs import SYSTEMS

_PLAIN = (
    "alpaca",
    "alpaca_zh",
    "arxiv",
    "code_alpaca",
    "colors",
    "default",
    "law_reference",
    "medical",
    "msagent_react",
    "oasst1",
    "openai",
    "openorca",
    "pretrain",
    "sql",
    "stack_exchange",
    "tiny_codes",
    "wizardlm",
)

FORMATS: Mapping[str, str] = {f"{name}_map_fn": name for name in _PLAIN} | {
    # XTuner lists this format without the second t.
    "crime_kg_assitant_map_fn": "crime_kg_assitan",
}
"""XTuner's mapping functions for text, and the row formats that they are."""
IMAGE_FORMATS: Mapping[str, str] = {"llava_map_fn": "llava", "llava_image_only_map_fn": "llava_image_only"}
"""Those of its datasets with images."""


@cache
def table(name: str) -> dict[str, Any]:
    """A table of this folder by its name."""
    return tomllib.loads(resources.files(__package__).joinpath(f"{name}.toml").read_text("utf-8"))


def systems() -> Mapping[str, str]:
    """XTuner's system texts by its names: those that its formats put before their rows, and what only recipes ask with."""
    return {**SYSTEMS, **table("texts")["systems"]}


def steps(iterations: int, accumulate: int) -> int:
    """Optimizer steps in so many of XTuner's iterations, one micro-batch each; 1 at least."""
    return max(1, iterations // max(1, accumulate))


def filled(system: str, bot: str) -> str:
    """A system text as XTuner's hook puts it: {bot_name} is the model's, doubled braces are single ones."""
    return system.replace("{bot_name}", bot).replace("{{", "{").replace("}}", "}")
