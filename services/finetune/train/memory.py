"""Memory of the machine at hand: what the fused path lays out in it, which layers autograd lets run forward twice, and what
a run came to hold."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from services.finetune import plan as plans
from services.finetune.config import ModelConfig, RunConfig
from services.finetune.devices import Device
from services.finetune.errors import FailedPrecondition
from services.finetune.modules import PROJECTOR, TOWER, is_seeing
from services.finetune.packing import Blocks
from services.finetune.plan import Batch, Held, Lay, fused_bytes
from services.finetune.shape import Shape, read_shape, tensor_shapes
from services.finetune.towers import (
    Computed,
    Tower,
    Trained,
    images_bytes,
    projector_bytes,
    read_tower,
    runs_twice,
    tower_bytes,
)
from services.finetune.train.methods import module_of

M_MMAP_THRESHOLD = -3
"""As malloc.h has it."""

LARGE = 1 << 20
"""Bytes from which memory of the host is given back when it is freed."""


def give_back() -> None:
    """Let freed tensors leave a CPU's memory, where the C library can be told. By itself it comes to keep all below 32 MiB
    for later, in holes that seldom fit: a step then takes a fifth more memory, and no plan can tell how much."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGE)


def plan(fused: Any, tokens: int, free: int) -> Held:
    """What micro-steps of up to `tokens` tokens hold in `free` bytes of the fused path's own device."""
    layer = fused.layers[0]
    qkv = layer.qkv.shape[0]
    lay = Lay(
        layers=len(fused.layers),
        item=fused.head.element_size(),
        hidden=fused.embedding.shape[1],
        vocabulary=fused.head.shape[0],
        qkv=qkv,
        raw=qkv if layer.heads.q_weight is not None else 0,
        mixed=layer.out.shape[1],
        gate_up=layer.gate_up.shape[0],
        ranks=max(sum(g.a_copy.shape[0] if g.adapted else 0 for g in each.groups) for each in fused.layers),
        heads=layer.heads.queries,
        dense=0 if layer.qkv.weight is not None else max(g.shape[0] * g.shape[1] for g in layer.groups),
        head_rows=fused.head_rows,
    )
    return fused_bytes(lay, tokens, free)


def plan_tower(causal: Any, images: int, free: int, config: ModelConfig) -> tuple[int, str]:
    """(bytes that tower and projector keep of so many images, in words): the tower's layers are set to run forward again in
    the backward pass if that is asked for, or needed in `free` bytes."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    tower, trained = tower_of(causal), trained_beside(causal)
    dropped = any("lora_dropout" in n and getattr(m, "p", 0.0) > 0 for n, m in causal.named_modules() if is_seeing(n))
    how = Computed(causal.dtype.itemsize, dropped, causal.device.type == "cuda")
    if tower is None or not trained.tower:
        return images_bytes(tower, trained, images, how, free), ""
    asked = config.gradient_checkpointing
    twice = asked in ("full", "selective") or (asked == "auto" and runs_twice(tower, images, how, free))
    layers = [m for m in causal.model.vision_tower.modules() if isinstance(m, GradientCheckpointingLayer)]
    if twice and layers:
        causal.gradient_checkpointing_enable({"use_reentrant": False})
        causal.disable_input_require_grads()
    for layer in causal.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = twice and layer in layers
    held = tower_bytes(tower, images, how, twice) + projector_bytes(tower, images, how.item)
    return held, f"; the tower runs forward {'twice' if twice else 'once'}, {held / 2**20:,.0f} MiB for {images} images"


def tower_of(causal: Any) -> Tower | None:
    """The sizes of a model's vision side; None of one that has none."""
    # What PEFT adds is not the model's; what it trains whole is there twice, under one name.
    own = [(n, p) for n, p in causal.named_parameters() if is_seeing(n) and ".lora_" not in n]
    shapes = {f"{module_of(n)}.{n.rpartition('.')[2]}": list(p.shape) for n, p in own}
    return read_tower(causal.config.to_dict(), shapes)


def trained_beside(causal: Any) -> Trained:
    """The trained weights of its vision side."""
    learns = [(n, p.numel()) for n, p in causal.named_parameters() if p.requires_grad]
    tower, projector = (sum(size for n, size in learns if n.startswith(part)) for part in (TOWER, PROJECTOR))
    return Trained(tower, projector)


def told(held: Held) -> str:
    """For people."""
    return (
        f"{held.layers - held.recomputed} of {held.layers} layers keep {held.per_layer / 2**20:,.0f} MiB each, "
        f"{held.recomputed} run forward twice"
    )


def planned(
    folder: Path, config: RunConfig, blocks: Blocks, steps: int, device: torch.device, dtype: torch.dtype
) -> int:
    """The peak that a plan gives for a run on this device, in bytes as flops.peak_memory counts; 0 where it gives none."""
    shape = shape_of(folder)
    if shape is None:
        return 0
    try:
        found = _planned(shape, config, blocks, steps, device, dtype)
    except FailedPrecondition:
        return 0
    return found.peak - (found.runtime if device.type == "cuda" else 0)


def shape_of(folder: Path) -> Shape | None:
    """A base's shape by its files; None if plans know none."""
    shapes: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                shapes |= tensor_shapes(lambda at, length, file=file: os.pread(file.fileno(), length, at))  # type: ignore[misc]
        return read_shape(json.loads((folder / "config.json").read_text()), shapes)
    except FailedPrecondition:
        return None


def _planned(
    shape: Shape, config: RunConfig, blocks: Blocks, steps: int, device: torch.device, dtype: torch.dtype
) -> plans.Memory:
    count, tokens = config.schedule.batch_size, len(blocks) * int(blocks.ids.shape[1])
    length = int(blocks.ids.shape[1])
    shown = sum(len(blocks.images_of(n)) for n in range(len(blocks))) if blocks.image_files else 0
    batch = Batch(count, length, -(-count * length * blocks.learned // tokens), -(-count * shown // len(blocks)))
    cuda = device.type == "cuda"
    place = Device("", torch.cuda.get_device_properties(device).total_memory) if cuda else Device("cpu")
    return plans.memory(shape, config, batch, steps, place, str(dtype).removeprefix("torch."))


def bound(made: Held, config: ModelConfig) -> Held:
    """The plan within what `model.gradient_checkpointing` allows."""
    least = {"full": made.layers, "selective": -(-made.layers // config.gradient_checkpointing_every)}
    recomputed = max(made.recomputed, least.get(config.gradient_checkpointing, 0))
    return replace(made, recomputed=0 if config.gradient_checkpointing == "none" else recomputed)


def recompute(causal: Any, config: ModelConfig, device: torch.device) -> str:
    """Let layers of a transformers model run forward again in autograd's backward pass; which, in words.

    What autograd keeps is known only once it is kept, so auto is all layers on a GPU, and none where memory is the host's.
    FailedPrecondition (MODEL_NOT_TRAINABLE) for a model that cannot do what is asked.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    wanted = config.gradient_checkpointing
    layers = [m for m in causal.modules() if isinstance(m, GradientCheckpointingLayer)]
    able = bool(layers) and causal.supports_gradient_checkpointing
    if wanted == "auto":
        wanted = "full" if device.type == "cuda" and able else "none"
    if wanted == "none":
        return "no layer runs forward twice"
    if not able:
        raise FailedPrecondition(
            f"{type(causal).__name__} cannot run layers forward again; set model.gradient_checkpointing to none",
            reason="MODEL_NOT_TRAINABLE",
        )
    causal.gradient_checkpointing_enable({"use_reentrant": False})
    # Only reentrant checkpoints need inputs with a gradient, and it would have to be computed.
    causal.disable_input_require_grads()
    every = config.gradient_checkpointing_every if wanted == "selective" else 1
    for n, layer in enumerate(layers):
        layer.gradient_checkpointing = n % every == 0
    return f"{-(-len(layers) // every)} of {len(layers)} layers run forward twice"


def spare(causal: Any) -> str:
    """Let all layers run forward again, if they do not yet and can; what was done, in words."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in causal.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not causal.supports_gradient_checkpointing or all(layer.gradient_checkpointing for layer in layers):
        return ""
    causal.gradient_checkpointing_enable({"use_reentrant": False})
    causal.disable_input_require_grads()
    return "layers run forward twice"


def free_bytes(device: torch.device) -> int:
    """Bytes that torch can still hand out on a GPU: free on it, or held by torch's allocator and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
