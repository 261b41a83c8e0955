"""DeepSpeed's presets: by name, as DeepSpeed's JSON, and found again in a JSON file of the user's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.finetune.config import RunConfig
from services.finetune.errors import InvalidArgument, nearest
from services.finetune.recipes.tables import table

# Tuning of DeepSpeed's own transport: it changes no number of a run.
_TUNING = [
    "overlap_comm",
    "contiguous_gradients",
    "allgather_partitions",
    "allgather_bucket_size",
    "reduce_scatter",
    "reduce_bucket_size",
    "round_robin_gradients",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
]
_OURS = ("train_batch_size", "steps_per_print", "wall_clock_breakdown")


def presets() -> list[str]:
    """The names of all presets."""
    return list(table("deepspeed")["presets"])


def preset_json(name: str) -> dict[str, Any]:
    """A preset as DeepSpeed takes it. InvalidArgument (DEEPSPEED_UNKNOWN)."""
    if name not in presets():
        raise InvalidArgument(
            f"unknown DeepSpeed preset {name!r}{nearest(name, presets())}", reason="DEEPSPEED_UNKNOWN"
        )
    tables = table("deepspeed")
    return {**tables["common"], "zero_optimization": tables["presets"][name]}


def lacks(config: RunConfig) -> dict[str, tuple[str, str]]:
    """What a run asks for that ZeRO does not do here: {key: (value, what to do)}."""
    found: dict[str, tuple[str, str]] = {}
    if config.optim.name not in ("adamw", "paged_adamw_32bit"):
        found["optim.name"] = config.optim.name, "set it to adamw"
    if config.model.dtype == "float16":
        found["model.dtype"] = "float16", "set it to bfloat16, or to float32"
    return found


def preset_of(data: Any, file: str) -> str:
    """The preset that a DeepSpeed JSON means. InvalidArgument (DEEPSPEED_UNSUPPORTED) naming what none of them has."""
    if not isinstance(data, Mapping) or not isinstance(data.get("zero_optimization"), Mapping):
        raise _unsupported(file, "zero_optimization is missing")
    common = table("deepspeed")["common"]
    for key, value in data.items():
        if key == "zero_optimization" or value == "auto" or key in _OURS:
            continue
        if key not in common:
            raise _unsupported(file, f"{key} is not supported")
        # Precision is model.dtype's: a file may only leave it open.
        if value != common[key] and not (isinstance(value, Mapping) and value.get("enabled") in ("auto", False)):
            raise _unsupported(file, f"{key} = {value!r}: set it in the config of the run, and to 'auto' here")
    asked = _meaning(data["zero_optimization"], file)
    for name in presets():
        if _meaning(table("deepspeed")["presets"][name], name) == asked:
            return name
    raise _unsupported(file, "stage and offloads are those of no preset")


def _meaning(zero: Mapping[str, Any], file: str) -> tuple[Any, ...]:
    known = ("stage", "offload_optimizer", "offload_param")
    for key in zero:
        if key not in known and key not in _TUNING:
            raise _unsupported(file, f"zero_optimization.{key} is not supported")
    offloads = []
    for key in known[1:]:
        place = zero.get(key) or {}
        device = place.get("device", "none") if isinstance(place, Mapping) else place
        if device not in ("none", "cpu"):
            raise _unsupported(file, f"zero_optimization.{key} can only be cpu")
        offloads.append(device)
    return (zero.get("stage"), *offloads)


def _unsupported(file: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{file}: {why}; presets are {', '.join(presets())}", reason="DEEPSPEED_UNSUPPORTED")
