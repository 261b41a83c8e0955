"""Vision towers: what is imported of CLIP, SigLIP and DINOv2 is the part that sees, for LLaVA models to be assembled with.

    source                             becomes
    CLIPModel, CLIPVisionModel         CLIPVisionModel
    SiglipModel, SiglipVisionModel     SiglipVisionModel without its pooling head, which LLaVA has no use for
    Dinov2Model                        CLIPVisionModel that computes the same (dinov2.py)

Every server of LLaVA models knows these two. A tower has no tokenizer; it is neither served nor trained alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.convert.native import check_names, expected_shapes
from services.finetune.convert.shards import NAMES, Stored, as_torch, cast_bytes, to_bytes, write
from services.finetune.errors import FailedPrecondition, InvalidArgument

CLIP, SIGLIP, DINOV2 = "clip_vision_model", "siglip_vision_model", "dinov2"
_KINDS = {"clip": CLIP, CLIP: CLIP, "siglip": SIGLIP, SIGLIP: SIGLIP, DINOV2: DINOV2}
_CLASSES = {CLIP: "CLIPVisionModel", SIGLIP: "SiglipVisionModel"}
PREFIX = "vision_model."
"""What begins the names of a tower's tensors in files, as hubs have them."""
PREPROCESSOR = "preprocessor_config.json"
_NO_PART = ("text_model.", "text_projection.", "visual_projection.", "logit_")
"""Of a model of two halves: what does not see."""

Read = Callable[[], Any]
"""A tensor in memory, when its turn comes."""


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor of a tower to be: read from a file as it is, or computed."""

    stored: Stored
    value: Read | None = None


def is_tower(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a vision model's that is known here, or of a model that has one as its half."""
    return config.get("model_type") in _KINDS


def write_tower(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    tensors: Sequence[Stored],
    out: Path,
    dtype: str,
    tell: Callable[[int, int], None],
) -> None:
    """Write the tower that a source with these files becomes: one file of weights, config.json, preprocessor_config.json.

    FailedPrecondition (MODEL_UNSUPPORTED), InvalidArgument (WEIGHTS_INCOMPLETE, CONFIG_MALFORMED).
    """
    kind = _KINDS[config["model_type"]]
    if not preprocessor:
        raise FailedPrecondition(
            f"a vision model needs its {PREPROCESSOR}, which says how images are scaled; add it",
            reason="MODEL_UNSUPPORTED",
        )
    if kind == DINOV2:
        from services.finetune.convert import dinov2

        vision, preprocessor, made = dinov2.as_clip(config, preprocessor, tensors)
    else:
        vision = _vision_config(config, kind)
        made = {name: Made(t.named(name)) for t in tensors if (name := _own_name(t.name, kind))}
    check_sizes(vision, preprocessor)
    shapes = expected_shapes(vision, "AutoModel")
    check_names((n.removeprefix(PREFIX) for n in made), shapes, tied=False)
    _check_shapes(made, shapes)
    dtype = dtype or NAMES[next(iter(made.values())).stored.dtype]
    targets = [m.stored.named(name).cast(dtype) for name, m in made.items()]
    total, done = sum(t.nbytes for t in targets), 0

    def data(target: Stored) -> Iterable[bytes | memoryview]:
        found = made[target.name]
        if found.value is None:
            return cast_bytes(found.stored, dtype)
        import torch

        return [to_bytes(found.value().to(getattr(torch, dtype)))]

    def count(target: Stored) -> None:
        nonlocal done
        done += target.nbytes
        tell(done, total)

    write(out, [targets], data, count)
    vision |= {"architectures": [_CLASSES[vision["model_type"]]], "dtype": dtype}
    for name, value in (("config.json", vision), (PREPROCESSOR, preprocessor)):
        (out / name).write_text(json.dumps(value, indent=2, sort_keys=True))


def describe_tower(config: Mapping[str, Any], tensors: Sequence[Stored]) -> dict[str, Any]:
    """The meta of a tower's artifact (docs/decisions/0003)."""
    return {
        "architecture": config["architectures"][0],
        "template": "",
        "system": "",
        "generation": {},
        "dtype": config["dtype"],
        "context_length": 0,
        "parameters": sum(t.count for t in tensors),
    }


def image_side(preprocessor: Mapping[str, Any]) -> int:
    """The side of the square, in pixels, that images become. FailedPrecondition (MODEL_UNSUPPORTED)."""
    given = preprocessor.get("crop_size") if preprocessor.get("do_center_crop", True) else None
    given = given or preprocessor.get("size")
    sides = {given} if isinstance(given, int) else {given.get("height"), given.get("width")} if given else set()
    side = next(iter(sides)) if len(sides) == 1 else None
    if type(side) is not int or side <= 0:
        raise _unsupported(f"its {PREPROCESSOR} does not make squares of images (crop_size or size)")
    return side


def check_llava(config: Mapping[str, Any]) -> None:
    """FailedPrecondition (MODEL_UNSUPPORTED) unless a LLaVA model's config.json has a tower and a projector as ours have."""
    vision = config.get("vision_config")
    kind = vision.get("model_type", CLIP) if isinstance(vision, Mapping) else ""
    if kind not in _CLASSES or type(config.get("vision_feature_layer", -2)) is not int:
        raise _unsupported(
            f"a LLaVA model has features of one layer of CLIP or SigLIP here, not of {kind or 'nothing'}"
        )


def check_sizes(vision: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> None:
    """FailedPrecondition (MODEL_UNSUPPORTED) unless images come as large as the tower has places for."""
    side, wanted, patch = image_side(preprocessor), vision.get("image_size", 224), vision.get("patch_size", 32)
    if side != wanted or not isinstance(patch, int) or side % patch:
        raise _unsupported(f"its images come as {side} pixels squared and it takes {wanted}, in patches of {patch}")


def _vision_config(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    inner = config.get("vision_config") if config["model_type"] != kind else config
    if not isinstance(inner, Mapping):
        raise InvalidArgument("config.json has no vision_config", reason="CONFIG_MALFORMED")
    left_out = ("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "model_type")
    more = {"vision_use_head": False} if kind == SIGLIP else {}
    return {**{k: v for k, v in inner.items() if k not in left_out}, "model_type": kind, **more}


def _own_name(name: str, kind: str) -> str:
    """A tensor's name in the tower's file; "" if it is no part of it."""
    if name.startswith(_NO_PART) or name.endswith("position_ids"):
        return ""
    name = PREFIX + name.removeprefix(PREFIX)
    return "" if kind == SIGLIP and name.startswith(f"{PREFIX}head.") else name


def _check_shapes(made: Mapping[str, Made], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, found in made.items():
        if found.stored.shape != shapes[name.removeprefix(PREFIX)] or found.stored.dtype not in ("F64", *NAMES):
            raise InvalidArgument(
                f"{name} is {found.stored.dtype} {list(found.stored.shape)}, which config.json does not say; fetch all of "
                "the model's files",
                reason="WEIGHTS_INCOMPLETE",
                metadata={"tensor": name},
            )


def computed(name: str, shape: tuple[int, ...], value: Read, like: Stored) -> Made:
    """A tensor that `value` computes, in the dtype of `like`."""
    return Made(Stored(name, like.dtype, shape, 0, 0).cast(NAMES.get(like.dtype, "float32")), value)


def read(tensor: Stored) -> Any:
    """A tensor in memory, in double precision."""
    return as_torch(tensor).double()


def _unsupported(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"this vision model cannot be used: {why}", reason="MODEL_UNSUPPORTED")
