"""A rank of a test as together.py, where the fused path computes on a CPU and deals out what asks for ZeRO-3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.finetune.config import RunConfig
from services.finetune.train import engine, memory, ops_torch, stage
from services.finetune.train.parallel import Group
from tests.finetune.train import together


def fused_here(patch: pytest.MonkeyPatch) -> None:
    """Let the fused path be for a CPU too, by what its operations mean."""

    def deals(folder: Path, config: RunConfig, group: Group, dtype: torch.dtype) -> bool:
        return group.world > 1 and config.parallel.deepspeed == "deepspeed_zero3"

    for module in (engine, stage):
        patch.setattr(module, "unfused", lambda *_: "")
        patch.setattr(module, "operations", lambda: ops_torch)
    patch.setattr(stage, "deals", deals)
    patch.setattr(memory, "free_bytes", lambda device: 1 << 40)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        fused_here(patch)
        together.main()
