"""Weights in the forms of compressed-tensors, as vLLM and transformers read them.

fp8   float8 e4m3, a scale per row (absmax / 448); activations become float8 per token as they come, so that nothing has
      to be calibrated
int4  -8 … 7 in groups of 128 along a row, a scale per group (absmax / 7.5), packed into int32; activations stay
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

GROUP = 128
_FP8_MAX = 448.0


def fp8(name: str, weight: Tensor) -> Mapping[str, Tensor]:
    """A weight [out, in] and its scales [out, 1]."""
    value = weight.float()
    scale = (value.abs().amax(1, keepdim=True) / _FP8_MAX).clamp(min=1e-12).to(weight.dtype)
    # By the scale as it is stored: what is read back is then nearest to what was.
    scaled = (value / scale.float()).clamp(-_FP8_MAX, _FP8_MAX)
    return {"weight": scaled.to(torch.float8_e4m3fn), "weight_scale": scale}


def int4(name: str, weight: Tensor) -> Mapping[str, Tensor]:
    """A weight [out, in], each number rounded to the nearest of its group."""
    scale = int4_scales(weight, group_of(weight.shape[1]))
    return packed(int4_round(weight.float(), scale), scale.to(weight.dtype))


def group_of(width: int) -> int:
    """How many numbers of a row share a scale: 128, or the largest power of two below it that divides the row."""
    group = GROUP
    while width % group:
        group //= 2
    return group


def int4_scales(weight: Tensor, group: int) -> Tensor:
    """[out, in / group] in the weight's dtype, for which -8 … 7 is the range."""
    grouped = weight.float().unflatten(1, (-1, group))
    scale: Tensor = (grouped.abs().amax(-1) / 7.5).clamp(min=1e-12)
    return scale.to(weight.dtype)


def int4_round(value: Tensor, scale: Tensor) -> Tensor:
    """[out, in] of -8 … 7, as int8; `scale` is [out, groups]."""
    each = scale.float().repeat_interleave(value.shape[1] // scale.shape[1], 1)
    return (value / each).round().clamp(-8, 7).to(torch.int8)


def packed(numbers: Tensor, scale: Tensor) -> Mapping[str, Tensor]:
    """What is stored of int4 numbers [out, in]."""
    from compressed_tensors.compressors import pack_to_int32

    shape = torch.tensor(numbers.shape, dtype=torch.int64)
    return {"weight_packed": pack_to_int32(numbers, 4), "weight_scale": scale, "weight_shape": shape}


def compressed_config(method: str, layers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """What config.json says of weights of `method`, fp8 or int4."""
    common = {"symmetric": True, "dynamic": False}
    if method == "fp8":
        group = {
            "weights": {**common, "num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {**common, "num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
        groups = {"group_0": {"targets": ["Linear"], **group}}
    else:
        groups = _int4_groups(layers, common)
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if method == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def _int4_groups(layers: Mapping[str, tuple[int, int]], common: Mapping[str, Any]) -> dict[str, Any]:
    """One group for all, or one for each group size, its layers named."""
    by_size: dict[int, list[str]] = {}
    for name, (_, width) in layers.items():
        by_size.setdefault(group_of(width), []).append(name)
    return {
        f"group_{n}": {
            "targets": ["Linear"] if len(by_size) == 1 else names,
            "weights": {**common, "num_bits": 4, "type": "int", "strategy": "group", "group_size": size},
        }
        for n, (size, names) in enumerate(sorted(by_size.items()))
    }
