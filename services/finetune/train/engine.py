"""Two ways to the gradients of a micro-step: the fused one where it is known to hold, else torch's autograd."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from services.finetune.config import ModelConfig
from services.finetune.packing import Blocks
from services.finetune.train import memory
from services.finetune.train.adapters import Uncovered
from services.finetune.train.batch import flatten
from services.finetune.train.model import causal_of, summed_loss

Batch = np.ndarray[Any, Any]
"""Numbers of blocks."""


class Engine(Protocol):
    """`begin` before each optimizer step, then `backprop` for each of its micro-steps."""

    def begin(self, tokens: int, reserved: int) -> str:
        """Make gradients zero. `tokens` is the most that a micro-step will have, `reserved` the bytes that others will
        still take on the device. What there is to tell, or ""."""
        ...

    def backprop(self, batch: Batch, learned: int, seed: int, scale: float = 1.0) -> Tensor:
        """The loss of the blocks in `batch`, summed over their learned tokens and divided by `learned`, on the device;
        its gradients times `scale` are added. `seed` belongs to this micro-step alone."""
        ...


class Autograd:
    """Any model, through its own forward."""

    def __init__(self, model: Any, blocks: Blocks, device: torch.device, dtype: torch.dtype) -> None:
        self.model = model
        self.blocks = blocks
        self.device = device
        self.dtype = dtype

    def begin(self, tokens: int, reserved: int) -> str:
        self.model.zero_grad(set_to_none=True)
        return ""

    def backprop(self, batch: Batch, learned: int, seed: int, scale: float = 1.0) -> Tensor:
        loss = summed_loss(self.model, *self._tensors(batch), dtype=self.dtype) / learned
        (loss * scale if scale != 1.0 else loss).backward()
        return loss.detach()

    def _tensors(self, batch: Batch) -> list[Tensor]:
        """ids, labels, positions, segments of blocks; labels stay in host memory (see summed_loss)."""
        arrays = (self.blocks.ids, self.blocks.labels, self.blocks.positions, self.blocks.segments)
        ids, labels, positions, segments = (torch.from_numpy(np.array(a[batch])).long() for a in arrays)
        if self.device.type == "cuda":
            # Only from pinned memory does a copy not wait for the GPU.
            ids, positions, segments = (
                t.pin_memory().to(self.device, non_blocking=True) for t in (ids, positions, segments)
            )
        return [ids, labels, positions, segments]


class Handmade:
    """Llama-shaped models on a GPU; see fused.py."""

    def __init__(self, model: Any, blocks: Blocks, device: torch.device, config: ModelConfig) -> None:
        from services.finetune.train import ops_triton
        from services.finetune.train.fused import Fused

        self.fused = Fused(model, ops_triton, int(blocks.ids.shape[1]))
        self.blocks = blocks
        self.device = device
        self.config = config
        self.planned = 0

    def begin(self, tokens: int, reserved: int) -> str:
        self.fused.adapters.begin()
        if tokens <= self.planned:
            return ""
        made = memory.bound(memory.plan(self.fused, tokens, memory.free_bytes(self.device) - reserved), self.config)
        self.planned, self.fused.recomputed = tokens, made.recomputed
        return f"micro-steps of up to {tokens} tokens: {made}"

    def backprop(self, batch: Batch, learned: int, seed: int, scale: float = 1.0) -> Tensor:
        return self.fused.backprop(flatten(self.blocks, batch, self.device), learned, seed, scale)


def choose(
    model: Any, blocks: Blocks, device: torch.device, dtype: torch.dtype, config: ModelConfig
) -> tuple[Engine, str]:
    """(engine, which and why). FailedPrecondition (MODEL_NOT_TRAINABLE) as memory.recompute."""
    why = "no GPU" if device.type != "cuda" else ""
    if dtype not in (torch.bfloat16, torch.float16):
        why = why or f"flash attention knows no {str(dtype).removeprefix('torch.')}"
    if not why:
        try:
            return Handmade(model, blocks, device, config), "fused kernels, attention by document"
        except (Uncovered, ImportError) as error:
            why = f"not covered by the fused kernels: {error}"
    twice = memory.recompute(causal_of(model), config, device)
    return Autograd(model, blocks, device, dtype), f"torch's autograd over dense masks ({why}); {twice}"
