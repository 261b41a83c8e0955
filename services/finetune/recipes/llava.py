"""The names of XTuner's LLaVA configs, which follow no one rule, and what each changes in a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from services.finetune.recipes.tables import steps, table

LOG_ITERATIONS = 10


@dataclass(frozen=True, slots=True)
class Sight:
    """A recipe of a model that sees: a row of models.toml, and a stage and a way of llava.toml."""

    model: str
    stage: str
    way: str
    changes: Mapping[str, Any]


@cache
def sights() -> Mapping[str, Sight]:
    """All, by name."""
    found = {}
    for row in table("llava")["recipe"]:
        for model in row["models"]:
            words = {"model": model, "size": model.split("_")[1]}
            found[row["name"].format(**words)] = Sight(model, row["stage"], row["way"], _changes(row, model, words))
    return found


def _changes(row: Mapping[str, Any], model: str, words: Mapping[str, str]) -> dict[str, Any]:
    tables, base = table("llava"), table("models")[model]
    stage, own = tables["stages"][row["stage"]], row.get("config", {})
    changes = {
        **tables["common"],
        "model.checkpoint": base["checkpoint"],
        "data.template": base["template"],
        **stage["config"],
        **tables["ways"][row["way"]],
        **own,
    }
    if "after" in row:
        changes["vision.pretrained"] = f"./work_dirs/{row['after'].format(**words)}"
    accumulate, iterations = changes["schedule.accumulate"], row.get("iterations", stage["iterations"])
    every = steps(iterations, accumulate)
    intervals = {"report.log_every": steps(LOG_ITERATIONS, accumulate), "report.checkpoint_every": every}
    return {**changes, **intervals, "report.sample_every": every}
