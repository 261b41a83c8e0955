"""Two ways to the gradients of a micro-step: the fused one where it is known to hold, else torch's autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from services.finetune.config import ModelConfig
from services.finetune.errors import out_of_memory
from services.finetune.packing import Blocks
from services.finetune.train import memory
from services.finetune.train.adapters import Uncovered
from services.finetune.train.attention import attends_by_document
from services.finetune.train.batch import Flat, flatten
from services.finetune.train.dealt import Dealt
from services.finetune.train.images import Images
from services.finetune.train.model import causal_of, computing, summed_loss
from services.finetune.train.parallel import ALONE, Batch, Group
from services.finetune.train.seeing import features

Unscale = Callable[[], None] | None
"""Divides gradients by the loss scale. It sees sums over all ranks, so that all find the same overflow and skip the same
step."""


class Engine(Protocol):
    """`begin` before each optimizer step, then `backprop` for each of its micro-steps."""

    collective: bool
    """Whether each micro-step is taken by all ranks together."""
    dealt: bool
    """Whether no rank has the whole model, so that its own forward too is a thing for all together."""
    repeats: bool
    """Whether a step in which memory ran out can be taken anew."""

    def begin(self, tokens: int, reserved: int) -> str:
        """Make gradients zero. `tokens` is the most that a micro-step will have, `reserved` the bytes that others will
        still take on the device. What there is to tell, or ""."""
        ...

    def backprop(self, batch: Batch, learned: int, seed: int, scale: float = 1.0) -> Tensor:
        """The loss of the blocks in `batch`, summed over their learned tokens and divided by `learned`, on the device;
        its gradients times `scale` are added. `seed` belongs to this micro-step alone. An empty batch adds nothing."""
        ...

    def agree(self) -> None:
        """After the last micro-step. torch.OutOfMemoryError on all ranks if memory ran out on one that went along."""
        ...

    def combine(self, parameters: list[Tensor], clip_norm: float, unscale: Unscale = None) -> Tensor:
        """Then: gradients summed over all ranks, `unscale` called on the sums, and these clipped to
        `clip_norm` (0 does not clip). Their L2 norm before that."""
        ...

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the weights by them."""
        ...

    def look(self, blocks: Blocks, batch: Batch) -> Tensor:
        """The loss of some of any blocks, summed over their learned tokens, without dropout and gradients."""
        ...

    def spare(self) -> str:
        """Take less memory and more time from now on; what was done, or "" if there is nothing to do."""
        ...


class Autograd:
    """Any model, through its own forward."""

    collective = dealt = False
    repeats = True

    def __init__(
        self,
        model: Any,
        blocks: Blocks,
        device: torch.device,
        dtype: torch.dtype,
        group: Group = ALONE,
        images: Images | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.device = device
        self.dtype = dtype
        self.group = group
        self.images = images

    def begin(self, tokens: int, reserved: int) -> str:
        self.model.zero_grad(set_to_none=True)
        return ""

    def backprop(self, batch: Batch, learned: int, seed: int, scale: float = 1.0) -> Tensor:
        if not len(batch):
            return torch.zeros((), device=self.device)
        loss = self._summed(self.blocks, batch) / learned
        if (
            loss.requires_grad
        ):  # else there are only rows without an image, and nothing of the language model is trained
            (loss * scale if scale != 1.0 else loss).backward()
        return loss.detach()

    def agree(self) -> None:
        """Each rank takes its own steps."""

    def combine(self, parameters: list[Tensor], clip_norm: float, unscale: Unscale = None) -> Tensor:
        self.group.sum_gradients(parameters)
        if unscale:
            unscale()
        return torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    @torch.no_grad()
    def look(self, blocks: Blocks, batch: Batch) -> Tensor:
        self.model.eval()
        return self._summed(blocks, batch)

    def spare(self) -> str:
        return memory.spare(causal_of(self.model))

    def _summed(self, blocks: Blocks, batch: Batch) -> Tensor:
        seen = self.images.seen(blocks, batch, packed=False) if self.images else None
        return summed_loss(self.model, *tensors(blocks, batch, self.device), dtype=self.dtype, seen=seen)


class Handmade:
    """Llama-shaped models on a GPU; see fused.py. Vision tower and projector go by autograd, on both sides of it.

    With `dealt` the layers' frozen weights are dealt out over the ranks, and a rank without blocks, or without memory, goes
    along."""

    repeats = True

    def __init__(
        self,
        model: Any,
        blocks: Blocks,
        device: torch.device,
        config: ModelConfig,
        positions: int,
        group: Group = ALONE,
        images: Images | None = None,
        ops: Any = None,
        dealt: Dealt | None = None,
    ) -> None:
        from services.finetune.train.fused import Fused

        self.model = model
        self.fused = Fused(model, ops or operations(), positions, dealt)
        self.collective = self.dealt = dealt is not None
        self.blocks = blocks
        self.device = device
        self.config = config
        self.group = group
        self.images = images
        self.planned = 0
        self.short = False
        """Whether memory ran out in this step, so that all that is left of it is to go along."""

    def begin(self, tokens: int, reserved: int) -> str:
        self.short = False
        self.fused.adapters.begin()
        for parameter in self.fused.beside:
            parameter.grad = None
        if tokens <= self.planned:
            return ""
        free, how = memory.free_bytes(self.device) - reserved, ""
        if self.images:
            held, how = memory.plan_tower(causal_of(self.model), tokens // self.images.form.tokens, free, self.config)
            free -= held
        made = memory.bound(memory.plan(self.fused, tokens, free), self.config)
        self.planned, self.fused.recomputed = tokens, made.recomputed
        return f"micro-steps of up to {tokens} tokens: {memory.told(made)}{how}"

    def backprop(self, batch: Batch, learned: int, seed: int, scale: float = 1.0) -> Tensor:
        self.fused.entered = 0
        if len(batch) and not self.short:
            try:
                return self._backprop(batch, learned, seed, scale)
            except (MemoryError, RuntimeError) as error:
                if not (self.dealt and out_of_memory(error)):
                    raise
                self.short = True
        # Only here is an error gone, and with it what its traceback held.
        self.fused.go_along()
        return torch.zeros((), device=self.device)

    def _backprop(self, batch: Batch, learned: int, seed: int, scale: float) -> Tensor:
        flat, features_MD = self._read(self.blocks, batch)
        if features_MD is None or flat.images_M is None:
            return self.fused.backprop(flat, learned, seed, scale)
        wanted = features_MD.requires_grad
        h_TD = self.fused.embed(flat, features_MD.detach())
        loss, grad_TD = self.fused.backprop_from(h_TD, flat, learned, seed, scale, needs_dx=wanted)
        if wanted:
            features_MD.backward(grad_TD.index_select(0, flat.images_M).to(features_MD.dtype))
        return loss

    def agree(self) -> None:
        # In host memory, so that nobody waits for a device: a host knows what it ran out of when it asks for it.
        if self.dealt and self.group.sum(torch.tensor(float(self.short))):
            raise torch.OutOfMemoryError(
                "memory ran out on this rank" if self.short else "memory ran out on another rank"
            )

    def combine(self, parameters: list[Tensor], clip_norm: float, unscale: Unscale = None) -> Tensor:
        self.group.sum(self.fused.adapters.grad)
        self.group.sum_gradients(self.fused.beside)
        if unscale:
            unscale()
        return torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)

    def apply(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()

    def look(self, blocks: Blocks, batch: Batch) -> Tensor:
        if not len(batch):
            self.fused.entered = 0
            self.fused.go_along(backward=False)
            return torch.zeros((), device=self.device)
        self.fused.adapters.begin()
        self.model.eval()
        with torch.no_grad():
            return self.fused.loss(*self._read(blocks, batch))

    def spare(self) -> str:
        layers = len(self.fused.layers)
        left = torch.tensor(float(layers - self.fused.recomputed))
        # Ranks that agreed on a lack do on what is done about it, whatever each had free.
        if not (self.group.sum(left) if self.dealt else left):
            return ""
        self.fused.recomputed = layers
        return "all layers run forward twice"

    def _read(self, blocks: Blocks, batch: Batch) -> tuple[Flat, Tensor | None]:
        """Tokens, and what stands at the places of those that are of images."""
        seen = self.images.seen(blocks, batch, packed=True) if self.images else None
        flat = flatten(blocks, batch, self.device)
        if seen is None:
            return flat, None
        with computing(self.device, self.fused.dtype):
            return replace(flat, images_M=seen.places_M), features(causal_of(self.model), seen)


def tensors(blocks: Blocks, batch: Batch, device: torch.device) -> list[Tensor]:
    """ids, labels, positions, segments of blocks; labels stay in host memory (see summed_loss)."""
    arrays = (blocks.ids, blocks.labels, blocks.positions, blocks.segments)
    ids, labels, positions, segments = (torch.from_numpy(np.array(a[batch])).long() for a in arrays)
    if device.type == "cuda":
        # Only from pinned memory does a copy not wait for the GPU.
        ids, positions, segments = (t.pin_memory().to(device, non_blocking=True) for t in (ids, positions, segments))
    return [ids, labels, positions, segments]


def operations() -> Any:
    """What the fused path computes with. ImportError."""
    from services.finetune.train import ops_triton

    return ops_triton


def unfused(device: torch.device, dtype: torch.dtype, fixed: bool) -> str:
    """Why the fused path is for no model here, or "". `fixed` asks for sums in a fixed order, which flash attention's
    backward does not have."""
    if device.type != "cuda":
        return "no GPU"
    if fixed:
        return "sums in a fixed order are asked for"
    known = dtype in (torch.bfloat16, torch.float16)
    return "" if known else f"flash attention knows no {str(dtype).removeprefix('torch.')}"


def choose(
    model: Any,
    blocks: Blocks,
    device: torch.device,
    dtype: torch.dtype,
    config: ModelConfig,
    longest: int = 0,
    fixed: bool = False,
    group: Group = ALONE,
    images: Images | None = None,
    dealt: Dealt | None = None,
) -> tuple[Engine, str]:
    """(engine, which and why). `longest` is the length of other blocks that will be looked at, `fixed` as unfused has it;
    `dealt` has the model's layers. FailedPrecondition (MODEL_NOT_TRAINABLE) as memory.recompute."""
    why = unfused(device, dtype, fixed)
    if not why:
        try:
            positions = max(longest, int(blocks.ids.shape[1]))
            made = Handmade(model, blocks, device, config, positions, group, images, dealt=dealt)
            over = f" over layers dealt out to {group.world} processes" if dealt else ""
            return made, f"fused kernels{over}, attention by document"
        except (Uncovered, ImportError) as error:
            if dealt:
                raise
            why = f"not covered by the fused kernels: {error}"
    twice = memory.recompute(causal_of(model), config, device)
    masks = "attention by document" if attends_by_document(causal_of(model)) else "over dense masks"
    return Autograd(model, blocks, device, dtype, group, images), f"torch's autograd, {masks} ({why}); {twice}"
