"""Where runs compute: processors, GPUs by kind, and how long one of these takes for a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.finetune.shape import Shape

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Device:
    """Where one process computes. `kind` is a key of DEVICES, "cpu", or empty; 0 bytes is unknown."""

    kind: str = ""
    memory: int = 0

    @property
    def gpu(self) -> bool:
        return self.kind != "cpu"


def cpu_has_bfloat16() -> bool:
    """Whether this machine's processor multiplies it in hardware: emulated, it is slower than float32."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


@dataclass(frozen=True, slots=True)
class Known:
    """A GPU as its maker describes it: bytes, and dense TFLOP/s in bfloat16 (float16 where it has none)."""

    memory: int
    tflops: float


DEVICES: Mapping[str, Known] = {
    "h200": Known(141 * 10**9, 989),
    "h100": Known(80 * GIB, 989),
    "a100-80g": Known(80 * GIB, 312),
    "a100": Known(40 * GIB, 312),
    "l40s": Known(48 * GIB, 362),
    "a10": Known(24 * GIB, 125),
    "l4": Known(24 * GIB, 121),
    "rtx4090": Known(24 * GIB, 165),
    "v100": Known(32 * GIB, 125),
    "t4": Known(16 * GIB, 65),
}
USE = (0.12, 0.50)
"""Of a GPU's TFLOP/s: from short rows on a small model to what docs/benchmarks.md measures (0.28 to 0.49)."""


def seconds(shape: Shape, tokens: int, device: Device, recomputed: float) -> tuple[float, float] | None:
    """(least, most) seconds of training on so many tokens, by 4 FLOP for each token and weight of a product, and 2 more
    where a layer runs forward twice; None where the device's speed is not known."""
    known = DEVICES.get(device.kind)
    if known is None:
        return None
    products = sum(one.parameters for one in shape.linears.values())
    flop = tokens * (products * (4 + 2 * recomputed) + 4 * shape.hidden * shape.vocabulary)
    return flop / (known.tflops * 1e12 * USE[1]), flop / (known.tflops * 1e12 * USE[0])
