"""The parts of a model that sees (transformers' LLaVA), and how features of images come into its language model.

Letters in shapes: N images, S pixels a side, P tokens of an image, W width of the tower, B blocks, L tokens of a block, T
tokens without padding, M places of image tokens, D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.finetune.modules import PROJECTOR, TOWER, is_llava, is_seeing

UNQUANTISED = (TOWER, PROJECTOR, "lm_head")


@dataclass(frozen=True, slots=True)
class Seen:
    """The images of a micro-step, in the order of their places: `pixels_N3SS` for a tower that runs with the step, or what a
    frozen tower made of them before, `known_NPW`."""

    places_M: Tensor
    """Where their tokens are among all of the micro-step, int64."""
    pixels_N3SS: Tensor | None = None
    known_NPW: Tensor | None = None


def sees(causal: Any) -> bool:
    return is_llava({"model_type": getattr(causal.config, "model_type", "")})


def language_of(causal: Any) -> Any:
    """The decoder: all of a text model."""
    return causal.model.language_model if sees(causal) else causal


def in_language(causal: Any, module: str) -> bool:
    """Whether a module of the causal model, by name, is of the language model."""
    return not sees(causal) or not is_seeing(module)


def look_at(causal: Any, pixels_N3SS: Tensor) -> Tensor:
    """What the tower makes of images, [N, P, W]: the layers that config.json names, as LlavaModel.get_image_features."""
    config = causal.config
    states = causal.model.vision_tower(pixels_N3SS, output_hidden_states=True, return_dict=True).hidden_states
    layers = config.vision_feature_layer
    chosen = [states[n] for n in ([layers] if isinstance(layers, int) else layers)]
    # "default" leaves the class token out.
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    return torch.cat([state[:, first:] for state in chosen], -1)


def features(causal: Any, seen: Seen) -> Tensor:
    """What stands at the places of the image tokens, [M, D]."""
    known = seen.known_NPW if seen.pixels_N3SS is None else look_at(causal, seen.pixels_N3SS)
    projected: Tensor = causal.model.multi_modal_projector(known)
    return projected.flatten(0, 1)


def embed(causal: Any, ids_BL: Tensor, seen: Seen) -> Tensor:
    """The language model's input [B, L, D]. Images without places are seen and change nothing: so every rank takes part."""
    plain_BLD = causal.get_input_embeddings()(ids_BL)
    features_MD = features(causal, seen).to(plain_BLD.dtype)
    if not len(seen.places_M):
        idle: Tensor = plain_BLD + 0 * features_MD.sum()
        return idle
    flat: Tensor = plain_BLD.flatten(0, 1).index_copy(0, seen.places_M, features_MD)
    return flat.view_as(plain_BLD)


def with_images(causal: Any) -> Callable[..., Any]:
    """The causal model's forward, which takes `seen` beside its own arguments."""
    plain = causal.forward

    @functools.wraps(plain)
    def forward(*args: Any, seen: Seen | None = None, **given: Any) -> Any:
        if seen is not None:
            given["inputs_embeds"] = embed(causal, given.pop("input_ids"), seen)
        return plain(*args, **given)

    return forward
