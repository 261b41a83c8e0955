"""What to change in a run that does not fit its device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from services.finetune.config import RunConfig, override
from services.finetune.devices import DEVICES, GIB, Device
from services.finetune.plan import Batch, memory
from services.finetune.shape import Shape


@dataclass(frozen=True, slots=True)
class Change:
    """Other values with which a run fits, by dotted key, and its peak then. `device` is another GPU, with equal values."""

    overrides: Mapping[str, Any]
    told: str
    peak: int
    device: str = ""


def changes(shape: Shape, config: RunConfig, batch: Batch, steps: int, device: Device, dtype: str) -> list[Change]:
    """What makes a run fit that does not, the least harmful first; each is computed, none is guessed."""
    found: list[Change] = []
    for overrides, told in _candidates(config):
        other = override(config, overrides)
        blocks, length = other.schedule.batch_size, min(batch.length, other.data.max_length)
        learned, images = (math.ceil(n * blocks * length / max(1, batch.tokens)) for n in (batch.learned, batch.images))
        peak = memory(shape, other, Batch(blocks, length, learned, images), steps, device, dtype).peak
        if peak <= device.memory:
            found.append(Change(overrides, told, peak))
            break
    for kind, known in sorted(DEVICES.items(), key=lambda entry: entry[1].memory):
        if device.gpu and known.memory > device.memory:
            peak = memory(shape, config, batch, steps, Device(kind, known.memory), dtype).peak
            if peak <= known.memory:
                found.append(Change({}, f"a GPU of {known.memory // GIB} GiB, as {kind}", peak, kind))
                break
    return found


def _candidates(config: RunConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes from the least harmful on: the same steps in more parts, a quantised base, both, shorter rows too."""
    schedule = config.schedule
    parts = [d for d in range(2, schedule.batch_size + 1) if schedule.batch_size % d == 0]
    smaller: list[dict[str, Any]] = [
        {"schedule.batch_size": schedule.batch_size // d, "schedule.accumulate": schedule.accumulate * d} for d in parts
    ]
    for one in smaller:
        yield one, "smaller micro-steps; the steps stay the same"
    least, quantised = (smaller[-1] if smaller else {}), {"method": "qlora", "quant.bits": 4}
    if config.method == "lora":
        yield quantised, "a base in 4 bits"
        yield {**least, **quantised}, "smaller micro-steps and a base in 4 bits"
        least = {**least, **quantised}
    length = config.data.max_length // 2
    while length >= 128:
        yield {**least, "data.max_length": length}, "shorter blocks: longer rows are cut there"
        length //= 2
