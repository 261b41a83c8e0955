"""How model and optimizer lie on the processes of a run: whole in each, or dealt out in a stage of ZeRO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from services.finetune.config import RunConfig
from services.finetune.recipes.deepspeed import lacks
from services.finetune.train.parallel import Group

ROOM = 0.7
"""Part of a GPU's memory that weights, gradients and optimizer may take; the rest is for what a step computes."""
STAGES = ("", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload")


def choose_stage(config: RunConfig, model: Any, group: Group) -> tuple[str, str]:
    """(a DeepSpeed preset, or "" for whole copies; why)."""
    asked = config.parallel.deepspeed
    if asked:
        if group.world == 1 and not asked.endswith("_offload"):
            return "", f"{asked} deals nothing out in one process, so training is as without it"
        return asked, "as configured"
    if group.world == 1:
        return "", ""
    whole = f"{group.world} processes with the whole model each"
    if not torch.cuda.is_available():
        return "", whole
    room = ROOM * torch.cuda.get_device_properties(group.local_rank).total_memory
    needs = needed_bytes(*count_bytes(model), group.world)
    able = [s for s in STAGES if not s or not lacks(config)]
    stage = next((s for s in able if needs[s] <= room), able[-1])
    told = f"{needs[stage] / 2**30:.1f} GiB a GPU for weights, gradients and optimizer"
    how = whole if not stage else "the lowest stage that fits"
    return stage, f"{how}: {told}"


def count_bytes(model: Any) -> tuple[int, int]:
    """(bytes of frozen weights, number of trainable ones)."""
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    return frozen, sum(p.numel() for p in model.parameters() if p.requires_grad)


def needed_bytes(frozen: int, trainable: int, world: int) -> Mapping[str, float]:
    """What each stage keeps on a GPU: float32 weights, gradients and AdamW's two states (Rajbhandari et al. 2020, 3.1).

    DeepSpeed keeps another copy of its part of the weights, which its optimizer works on.
    """
    return {
        "": frozen + 16 * trainable,
        "deepspeed_zero1": frozen + 8 * trainable + 12 * trainable / world,
        "deepspeed_zero2": frozen + 4 * trainable + 16 * trainable / world,
        "deepspeed_zero3": (frozen + 20 * trainable) / world,
        "deepspeed_zero3_offload": 0.0,
    }
