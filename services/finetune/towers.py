"""What a LLaVA's vision tower and projector take: weights, bytes while they run, operations. From numbers alone.

Letters: T tokens in the tower, with its class token; W its width, F its inner width; P tokens of an image for the language
model, D its width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.finetune.config import LoraConfig, RunConfig, matches
from services.finetune.modules import PROJECTOR, TOWER, in_memory, is_llava, is_seeing

SHARE = 0.25
_OWN = TOWER.removesuffix("."), PROJECTOR.removesuffix(".")
"""Modules."""


@dataclass(frozen=True, slots=True)
class Tower:
    """Sizes in elements; `linears` are [outputs, inputs] by the name that the model has for the layer."""

    layers: int
    used: int
    """Layers before what the language model is given: of those after, a step keeps nothing."""
    width: int
    inner: int
    tokens: int
    """T."""
    given: int
    """P."""
    language: int
    """D."""
    parameters: int
    projector: int
    """Its parameters."""
    linears: Mapping[str, tuple[int, int]]


def read_tower(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]]) -> Tower | None:
    """The vision side of a model's config.json and files; None of a model that has none."""
    vision = config.get("vision_config") if is_llava(config) else None
    if not vision:
        return None
    patches = (int(vision.get("image_size", 224)) // int(vision["patch_size"])) ** 2
    extra = 0 if vision.get("model_type") == "siglip_vision_model" else 1
    whole = config.get("vision_feature_select_strategy", "default") == "full"
    own = {in_memory(n, config): tuple(shape) for n, shape in tensors.items() if is_seeing(n)}
    tower = {n: shape for n, shape in own.items() if n.startswith(TOWER)}
    width = int(vision["hidden_size"])
    layers, asked = int(vision["num_hidden_layers"]), config.get("vision_feature_layer", -2)
    # Number 0 is what goes into the first layer.
    states = [n if n >= 0 else layers + 1 + n for n in ([asked] if isinstance(asked, int) else asked)]
    return Tower(
        layers=layers,
        used=max(states),
        width=width,
        inner=int(vision.get("intermediate_size") or vision.get("mlp_ratio", 4) * width),
        tokens=patches + extra,
        given=patches + extra - (0 if whole else 1),
        language=int((config.get("text_config") or {}).get("hidden_size", 0)),
        parameters=sum(math.prod(s) for s in tower.values()),
        projector=sum(math.prod(s) for n, s in own.items() if n.startswith(PROJECTOR)),
        linears={
            n.removesuffix(".weight"): (s[0], s[1])
            for n, s in tower.items()
            if len(s) == 2 and n.endswith(".weight") and re.search(r"\.\d+\.", n)
        },
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """Trained weights of the tower and the projector."""

    tower: int
    projector: int


def trained_of(tower: Tower | None, config: RunConfig) -> Trained:
    """What a run trains of them."""
    if tower is None:
        return Trained(0, 0)
    if config.method == "full":
        own, projector = (not any(matches(p, name) for p in config.model.freeze) for name in _OWN)
        return Trained(own * tower.parameters, projector * tower.projector)
    lora = config.lora
    own, projector = (any(matches(p, name) for p in lora.modules_to_save) for name in _OWN)
    return Trained(tower.parameters if own else tower_adapters(tower, lora), projector * tower.projector)


def tower_adapters(tower: Tower | None, lora: LoraConfig) -> int:
    """LoRA's weights in a tower that is not trained whole."""
    if tower is None or any(matches(p, _OWN[0]) for p in lora.modules_to_save):
        return 0
    total = 0
    for name, (outputs, inputs) in tower.linears.items():
        if any(matches(p, name) for p in lora.targets):
            rank = next((r for p, r in lora.rank_pattern.items() if matches(p, name)), lora.rank)
            total += rank * (outputs + inputs)
    return total


@dataclass(frozen=True, slots=True)
class Computed:
    """How a tower that is trained computes."""

    item: int
    """Bytes of a number, beside a hidden state of 4."""
    dropped: bool
    """Whether its adapters drop some of their input."""
    gpu: bool


def tower_bytes(tower: Tower, images: int, how: Computed, twice: bool) -> int:
    """What a tower that is trained keeps of so many images for its backward pass (norms give a hidden state in float32 under
    autocast); `twice`: each layer its input alone, and one layer all.

    A layer keeps the inputs of two norms, attention's queries, keys, values and output, what its activation comes from and
    goes to, and the inputs of six adapters. Each that drops some has an input of its own and beside it what was dropped:
    a byte on a GPU, a number on a CPU. Else q, k and v have one, and the output's is attention's, but under autocast each
    has its own cast.
    """
    item, adapters = how.item, 5 * tower.width + tower.inner
    inputs = item * (adapters if how.item < 4 else 2 * tower.width + tower.inner)
    if how.dropped:
        inputs = (item + (1 if how.gpu else item)) * adapters
    layer = 8 * tower.width + item * (4 * tower.width + 2 * tower.inner) + inputs
    each = 4 * tower.width if twice else layer
    return images * tower.tokens * (tower.used * each + (layer if twice else 0))


def projector_bytes(tower: Tower, images: int, item: int) -> int:
    """What the projector keeps of so many images: its input, both sides of its activation, and what it gives with the
    gradient of that."""
    return images * tower.given * item * (tower.width + 4 * tower.language)


def images_bytes(tower: Tower | None, trained: Trained, images: int, how: Computed, free: int) -> int:
    """What tower and projector keep of a micro-step's images, in so many free bytes: nothing of what is before all that is
    trained."""
    if tower is None or not (trained.tower or trained.projector):
        return 0
    own = tower_bytes(tower, images, how, runs_twice(tower, images, how, free)) if trained.tower else 0
    return own + projector_bytes(tower, images, how.item)


def runs_twice(tower: Tower, images: int, how: Computed, free: int) -> bool:
    """Whether the tower's layers run forward again in the backward pass: where they would keep more than SHARE of what is
    free, which the language model's layers need more: running those again costs more time."""
    return tower_bytes(tower, images, how, False) > SHARE * free


def image_flops(tower: Tower, seen: bool, learns: bool, projector_learns: bool) -> int:
    """Operations for an image: `seen` by the tower in this step, which `learns`; and through the projector.

    A product costs 2 for each weight and token, and as much again for each gradient: that of its own weight, and that of
    its input, which what is trained before it asks for.
    """
    products = sum(o * i for o, i in tower.linears.values())
    forward = 2 * tower.tokens * products + 4 * tower.layers * tower.tokens**2 * tower.width
    projector = 2 * tower.given * tower.projector
    return (forward * (2 if learns else 1) if seen else 0) + projector * (1 + learns + projector_learns)
