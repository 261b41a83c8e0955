"""How model and optimizer lie on the processes of a run: whole in each, or dealt out in a stage of ZeRO."""

from __future__ import annotations

from typing import Any

import torch

from services.finetune.config import RunConfig
from services.finetune.plan import ROOM, STAGES, needed_bytes
from services.finetune.recipes.deepspeed import lacks
from services.finetune.train.parallel import Group


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
