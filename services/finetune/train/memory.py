"""Memory of the machine at hand: what the fused path lays out in it, and what a run came to hold."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

from services.finetune import plan as plans
from services.finetune.config import RunConfig
from services.finetune.errors import FailedPrecondition
from services.finetune.packing import Blocks
from services.finetune.plan import Batch, Device, Held, Lay, fused_bytes

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
        ranks=sum(g.a_copy.shape[0] if g.adapted else 0 for g in layer.groups),
        heads=layer.heads.queries,
        dense=0 if layer.qkv.weight is not None else max(g.shape[0] * g.shape[1] for g in layer.groups),
        head_rows=fused.head_rows,
    )
    return fused_bytes(lay, tokens, free)


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
    shapes: dict[str, list[int]] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                shapes |= plans.tensor_shapes(lambda at, length, file=file: os.pread(file.fileno(), length, at))  # type: ignore[misc]
        shape = plans.read_shape(json.loads((folder / "config.json").read_text()), shapes)
        found = _planned(shape, config, blocks, steps, device, dtype)
    except FailedPrecondition:
        return 0
    return found.peak - (found.runtime if device.type == "cuda" else 0)


def _planned(
    shape: plans.Shape, config: RunConfig, blocks: Blocks, steps: int, device: torch.device, dtype: torch.dtype
) -> plans.Memory:
    count, tokens = config.schedule.batch_size, len(blocks) * int(blocks.ids.shape[1])
    length = int(blocks.ids.shape[1])
    batch = Batch(count, length, -(-count * length * blocks.learned // tokens))
    cuda = device.type == "cuda"
    place = Device("", torch.cuda.get_device_properties(device).total_memory) if cuda else Device("cpu")
    return plans.memory(shape, config, batch, steps, place, str(dtype).removeprefix("torch."))


def free_bytes(device: torch.device) -> int:
    """Bytes that torch can still hand out on a GPU: free on it, or held by torch's allocator and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
