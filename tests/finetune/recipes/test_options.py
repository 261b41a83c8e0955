"""XTuner's keys where ours are wanted."""

from __future__ import annotations

from typing import Any

import pytest

from services.finetune.config import RunConfig, keys
from services.finetune.errors import InvalidArgument
from services.finetune.recipes.options import _INTERVALS, _SAME, is_ours, translate


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"optim.lr": 1e-3}, {"optim.lr": 1e-3}),
        ({"optim_wrapper.optimizer.lr": 1e-3}, {"optim.lr": 1e-3}),
        ({"max_epochs": 2, "train_dataloader.batch_size": 4}, {"schedule.epochs": 2, "schedule.batch_size": 4}),
        ({"betas": [0.8, 0.9]}, {"optim.beta1": 0.8, "optim.beta2": 0.9}),
        ({"save_steps": 160}, {"report.checkpoint_every": 10}),
        ({"save_steps": 160, "accumulative_counts": 4}, {"report.checkpoint_every": 40, "schedule.accumulate": 4}),
        ({"model.lora.target_modules": ["q_proj"]}, {"lora.targets": ["q_proj"]}),
    ],
)
def test_xtuners_keys_become_ours(given: dict[str, Any], ours: dict[str, Any]) -> None:
    assert translate(RunConfig(), given) == ours


@pytest.mark.parametrize("given", [{"lrr": 1}, {"save_steps": "often"}, {"betas": 1}, {"optim.lr": "fast"}])
def test_what_is_neither_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        translate(RunConfig(), given)


def test_every_key_that_is_meant_exists() -> None:
    assert {*_SAME, *_INTERVALS.values()} <= set(keys(RunConfig()))
    assert is_ours("optim.lr") and not is_ours("lr")
