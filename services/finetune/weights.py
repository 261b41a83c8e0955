"""What a run trains of its base, and the bytes that the base is loaded into; from numbers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from services.finetune.config import RunConfig, matches
from services.finetune.modules import is_seeing
from services.finetune.shape import Linear, Shape
from services.finetune.towers import tower_adapters

ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def lora_parameters(shape: Shape, config: RunConfig) -> int:
    lora, total = config.lora, 0
    for leaf, one in adapted(shape, config).items():
        ranks = [
            next((r for p, r in lora.rank_pattern.items() if matches(p, n)), lora.rank) for n in _named(shape, leaf)
        ]
        mean = sum(ranks) / len(ranks) if ranks else lora.rank
        total += int(one.count * (mean * (one.inputs + one.outputs) + lora.use_dora * one.outputs))
    return total


def adapted(shape: Shape, config: RunConfig) -> dict[str, Linear]:
    """The linear layers that get an adapter; with method full all of them, which are trained themselves."""
    targets = config.lora.targets
    if "all-linear" in targets or config.method == "full":
        return dict(shape.linears)
    found = {}
    for leaf, one in shape.linears.items():
        hits = sum(any(matches(t, name) for t in targets) for name in _named(shape, leaf))
        count = one.count if leaf in targets else hits
        if count:
            found[leaf] = dataclasses.replace(one, count=count)
    return found


def _named(shape: Shape, leaf: str) -> list[str]:
    return [name for name in shape.modules if name.rpartition(".")[2] == leaf and not is_seeing(name)]


def meant(shape: Shape, patterns: Sequence[str]) -> list[str]:
    """The modules that patterns mean, with all that is in them."""

    def named(name: str) -> bool:
        parts = name.split(".")
        inside = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(matches(pattern, one) for pattern in patterns for one in inside)

    return [name for name in shape.modules if named(name)]


def whole(shape: Shape, patterns: Sequence[str]) -> int:
    """Parameters of the modules that patterns mean, with all that is in them."""
    return sum(shape.modules[name] for name in meant(shape, patterns))


def trained_parameters(shape: Shape, config: RunConfig) -> int:
    if config.method == "full":
        return shape.parameters - whole(shape, config.model.freeze)
    lora = config.lora
    return lora_parameters(shape, config) + whole(shape, lora.modules_to_save) + tower_adapters(shape.tower, lora)


def weight_bytes(shape: Shape, config: RunConfig, dtype: str) -> int:
    """The base as it is loaded. NF4 is half a byte a weight and a scale for 64: a byte, or 4 without double quantisation;
    8 bits have a scale for each output. What is trained whole is float32."""
    if config.method == "full":
        trained = trained_parameters(shape, config)
        return 4 * trained + (shape.parameters - trained) * ITEM[dtype]
    base = shape.parameters * ITEM[dtype]
    if config.quant.bits == 0:
        return base
    linear = sum(one.parameters for one in shape.linears.values())
    scale = (1 + 4 / 256) / 64 if config.quant.double_quant else 4 / 64
    small = linear * (0.5 + scale)
    if config.quant.bits == 8:
        small = linear + sum(4 * one.count * one.outputs for one in shape.linears.values())
    return int(base - linear * ITEM[dtype] + small)


def dealt_bytes(shape: Shape, config: RunConfig, dtype: str, world: int) -> int:
    """The base as each of `world` processes has it where the fused path deals layers out: its part of them, the two that are
    put together, and all else whole."""
    linear = sum(one.parameters for one in shape.linears.values())
    rest = (shape.parameters - linear) * ITEM[dtype]
    layers = weight_bytes(shape, config, dtype) - rest
    return rest + layers // world + 2 * layers // shape.layers
