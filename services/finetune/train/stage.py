"""How model and optimizer lie on the processes of a run: whole in each, or dealt out in a stage of ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from services.finetune.config import RunConfig, override
from services.finetune.devices import Device
from services.finetune.plan import ROOM, STAGES, engine, needed_bytes
from services.finetune.recipes.deepspeed import lacks
from services.finetune.train.adapters import Uncovered
from services.finetune.train.dealt import Dealt
from services.finetune.train.engine import operations, unfused
from services.finetune.train.memory import shape_of
from services.finetune.train.model import load_model
from services.finetune.train.parallel import Group


def load_base(
    folder: Path, config: RunConfig, dtype: torch.dtype, fixed: bool, group: Group, log: Callable[[str], object]
) -> tuple[Any, Dealt | None]:
    """(the model under training, what deals it out under the fused path), as load_model."""
    if deals(folder, config, group, dtype) and not unfused(group.device, dtype, fixed):
        try:
            operations()
            dealt = Dealt(group, group.device)
            return load_model(folder, config, dtype, dealt), dealt
        except (Uncovered, ImportError) as error:
            log(f"not dealt out under the fused kernels: {error}")
    return load_model(folder, config, dtype), None


def deals(folder: Path, config: RunConfig, group: Group, dtype: torch.dtype) -> bool:
    """Whether the fused path deals a base's layers out: where ZeRO-3 is asked for, or whole copies do not fit. It is told
    from the base's files, for a base that is dealt out is never loaded whole."""
    shape = shape_of(folder) if group.world > 1 and torch.cuda.is_available() else None
    if shape is None:
        return False
    config = override(config, {"parallel.processes": group.world, "parallel.nodes": 1})
    device = Device("", torch.cuda.get_device_properties(group.local_rank).total_memory)
    return engine(shape, config, device, str(dtype).removeprefix("torch.")) == "dealt"


def choose_stage(config: RunConfig, model: Any, group: Group) -> tuple[str, str]:
    """(a DeepSpeed preset, or "" for whole copies; why), where the fused path deals nothing out."""
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
