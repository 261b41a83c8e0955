"""Recipes: a name such as ``internlm_chat_7b_qlora_oasst1_e3`` is model x method x dataset and epochs, each a table row.

`resolve` lays the rows over the defaults of RunConfig: method, model, dataset, the end of the name, overrides. The names of
models that see are llava.toml's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from services.finetune.config import ParallelConfig, RunConfig, override
from services.finetune.errors import NotFound, nearest
from services.finetune.recipes.deepspeed import presets
from services.finetune.recipes.llava import sights
from services.finetune.recipes.tables import filled, steps, systems, table

SEED, LLAVA = "seed", "llava"
# XTuner's own intervals between log lines and between checkpoints, in its iterations.
LOG_ITERATIONS, SAVE_ITERATIONS = 10, 500


@dataclass(frozen=True, slots=True)
class Recipe:
    """A resolved recipe. `checkpoint` is where its base model comes from; `tested` tells that it was trained here.

    `since` is "seed" for XTuner 0.1.9's names, "llava" for those of XTuner 0.2.0 for models that see, whose dataset is a
    stage, "quartet" for ours, "" for a crossing that is not on offer. A DeepSpeed preset has the method "deepspeed" and no
    model: it is one part of a config.
    """

    name: str
    model: str
    dataset: str
    method: str
    checkpoint: str
    tested: bool
    since: str
    config: RunConfig


@dataclass(frozen=True, slots=True)
class _Offer:
    model: str
    method: str
    dataset: str
    epochs: int
    ending: str
    since: str = ""
    tested: bool = False


def names(pattern: str = "", since: str = "") -> list[str]:
    """The names on offer that contain `pattern`, whatever its case, in order; with `since`, only those."""
    known = {**dict.fromkeys(presets(), SEED), **{name: offer.since for name, offer in _offers().items()}}
    known |= dict.fromkeys(sights(), LLAVA)
    return sorted(n for n, s in known.items() if pattern.lower() in n.lower() and since in ("", s))


@cache
def resolve(name: str) -> Recipe:
    """A recipe with every value filled in. NotFound (RECIPE_UNKNOWN) naming the nearest."""
    if name in presets():
        config = RunConfig(parallel=ParallelConfig(deepspeed=name))  # type: ignore[arg-type]  # a preset's name
        return Recipe(name, "", name.removeprefix("deepspeed_"), "deepspeed", "", False, SEED, config)
    if name in sights():
        sight = sights()[name]
        config = override(RunConfig(), sight.changes)
        return Recipe(name, sight.model, sight.stage, config.method, config.model.checkpoint, False, LLAVA, config)
    offer = _offers().get(name) or _split(name)
    if offer is None:
        raise NotFound(
            f"unknown recipe {name!r}{nearest(name, names())}; a name is MODEL_METHOD_DATASET_eEPOCHS",
            reason="RECIPE_UNKNOWN",
            metadata={"recipe": name},
        )
    config = override(RunConfig(), _changes(name, offer))
    dataset = name.removeprefix(f"{offer.model}_{offer.method}_")
    checkpoint = config.model.checkpoint
    return Recipe(name, offer.model, dataset, offer.method, checkpoint, offer.tested, offer.since, config)


def _changes(name: str, offer: _Offer) -> dict[str, Any]:
    model, dataset, catalogue = table("models")[offer.model], table("datasets")[offer.dataset], table("catalogue")
    texts = table("texts")
    changes = {
        **table("methods")[offer.method],
        "model.checkpoint": model["checkpoint"],
        "data.template": model["template"],
        "data.sources": dataset.get("sources", []),
        "report.prompts": texts["prompts"][dataset["prompts"]],
        "report.system": filled(systems().get(dataset.get("system", ""), ""), model.get("bot", "")),
        "schedule.epochs": offer.epochs,
        **dataset.get("config", {}),
        **(catalogue["endings"][offer.ending] if offer.ending else {}),
    }
    for row in catalogue["override"]:
        if fnmatchcase(name, row["match"]):
            changes |= row["config"]
    return {**_intervals(dataset, changes["schedule.accumulate"]), **changes}


def _intervals(dataset: Mapping[str, Any], accumulate: int) -> dict[str, int]:
    """XTuner's intervals in optimizer steps, for datasets that have them."""
    if "iterations" not in dataset:
        return {}
    return {
        "report.sample_every": steps(dataset["iterations"], accumulate),
        "report.checkpoint_every": steps(SAVE_ITERATIONS, accumulate),
        "report.log_every": steps(LOG_ITERATIONS, accumulate),
    }


@cache
def _offers() -> Mapping[str, _Offer]:
    found: dict[str, _Offer] = {}
    for row in table("catalogue")["offer"]:
        for model in _members(row["models"]):
            for method in row["methods"]:
                for dataset in _members(row["datasets"]):
                    offer = _offer(model, method, dataset, row["since"], row.get("tested", False))
                    found.setdefault(f"{model}_{method}_{dataset}", offer)
    return found


def _members(listed: list[str]) -> Iterator[str]:
    for name in listed:
        if name.startswith("@"):
            yield from _members(table("catalogue")["groups"][name[1:]])
        else:
            yield name


def _offer(model: str, method: str, text: str, since: str = "", tested: bool = False) -> _Offer:
    """`text` is dataset_eEPOCHS, or dataset_example for one epoch, and perhaps an ending. KeyError for no such rows."""
    match = re.fullmatch(r"(.+?)_(?:e([1-9]\d{0,2})|example)(?:_([a-z0-9]+))?", text)
    if match is None or match[1] not in table("datasets") or (match[3] or "hf") not in table("catalogue")["endings"]:
        raise KeyError(text)
    return _Offer(model, method, match[1], int(match[2] or 1), match[3] or "", since, tested)


def _split(name: str) -> _Offer | None:
    """A name that is not on offer, taken apart by the tables; the longest method first, as int8_lora holds lora."""
    for method in sorted(table("methods"), key=len, reverse=True):
        model, found, rest = name.partition(f"_{method}_")
        if found and model in table("models"):
            try:
                return _offer(model, method, rest)
            except KeyError:
                continue
    return None
