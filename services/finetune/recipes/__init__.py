"""Recipes: a name such as ``internlm_chat_7b_qlora_oasst1_e3`` is model x method x dataset and epochs, each a table row.

`resolve` lays the rows over the defaults of RunConfig: method, then dataset, then what the name says.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from services.finetune.config import RunConfig, override
from services.finetune.errors import NotFound, nearest


@dataclass(frozen=True, slots=True)
class Recipe:
    """A resolved recipe. `checkpoint` is where its base model comes from; `tested` is false for crossings not offered."""

    name: str
    model: str
    dataset: str
    method: str
    checkpoint: str
    tested: bool
    config: RunConfig


def names(pattern: str = "") -> list[str]:
    """The names on offer that contain `pattern`, whatever its case, in order."""
    return sorted(name for name in _offers() if pattern.lower() in name.lower())


def resolve(name: str) -> Recipe:
    """A recipe with every value filled in. NotFound (RECIPE_UNKNOWN) naming the nearest."""
    parts = _offers().get(name) or _split(name)
    if parts is None:
        raise NotFound(
            f"unknown recipe {name!r}{nearest(name, list(_offers()))}; a name is MODEL_METHOD_DATASET_eEPOCHS",
            reason="RECIPE_UNKNOWN",
            metadata={"recipe": name},
        )
    model, method, dataset, epochs = parts
    row = _table("datasets")[dataset]
    changes: dict[str, Any] = {
        **_table("methods")[method],
        **row.get("config", {}),
        "report.prompts": row.get("prompts", []),
        "schedule.epochs": epochs,
        "model.checkpoint": _table("models")[model]["checkpoint"],
        "data.template": _table("models")[model]["template"],
    }
    config = override(RunConfig(), changes)
    checkpoint = config.model.checkpoint
    return Recipe(name, model, f"{dataset}_e{epochs}", method, checkpoint, name in _offers(), config)


@cache
def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath(f"{name}.toml").read_text())


@cache
def _offers() -> dict[str, tuple[str, str, str, int]]:
    found = {}
    for offer in _table("catalogue")["offer"]:
        for model in offer["models"]:
            for method in offer["methods"]:
                for dataset in offer["datasets"]:
                    row, _, epochs = dataset.rpartition("_e")
                    found[f"{model}_{method}_{dataset}"] = (model, method, row, int(epochs))
    return found


def _split(name: str) -> tuple[str, str, str, int] | None:
    """A name that is not on offer, taken apart by the tables."""
    match = re.fullmatch(r"(.+)_e(\d{1,3})", name)
    if match is None or int(match[2]) < 1:
        return None
    for method in _table("methods"):
        model, found, dataset = match[1].partition(f"_{method}_")
        if found and model in _table("models") and dataset in _table("datasets"):
            return model, method, dataset, int(match[2])
    return None
