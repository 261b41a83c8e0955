"""The optimizer over the trainable weights, and the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from services.finetune.config import OptimConfig, RunConfig, ScheduleConfig, matches
from services.finetune.train.methods import find, module_of, within

_UNPAGED = {"paged_adamw_32bit": "adamw", "paged_adamw_8bit": "adamw_8bit", "paged_lion_8bit": "lion_8bit"}
_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "lion": "Lion32bit",
    "lion_8bit": "Lion8bit",
    "paged_lion_8bit": "PagedLion8bit",
}


def choose_optimizer(name: str, device: torch.device, dealt: bool = False) -> tuple[str, str]:
    """(the optimizer that runs for the configured one, what there is to tell about it). `dealt` is by ZeRO."""
    if name not in _UNPAGED or (device.type == "cuda" and not dealt):
        return name, f"optimizer {name}"
    # Paging moves state between a GPU and host memory.
    why = "ZeRO deals its state out" if dealt else "without a GPU there is nothing to page"
    return _UNPAGED[name], f"optimizer {_UNPAGED[name]} in place of {name}: {why}"


def make_optimizer(
    config: RunConfig, model: Any, parameters: Mapping[str, Tensor], dealt: bool = False
) -> tuple[torch.optim.Optimizer, str]:
    """(optimizer, which and why). Each of its groups has its highest rate as `peak_lr`. `dealt` is by ZeRO.
    InvalidArgument (CONFIG_VALUE_INVALID) for a pattern of rates that nothing trained matches."""
    device = next(iter(parameters.values())).device
    name, told = choose_optimizer(config.optim.name, device, dealt)
    made = _make(name, config.optim, group(config, model, parameters), device.type == "cuda")
    for one in made.param_groups:
        one["lr"] = one["peak_lr"]
    return made, told


def _make(name: str, config: OptimConfig, groups: list[dict[str, Any]], fused: bool) -> torch.optim.Optimizer:
    lr, betas = config.lr, (config.beta1, config.beta2)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas, config.eps, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, config.momentum, fused=fused)
    if name == "adafactor":
        return torch.optim.Adafactor(groups, lr)
    from bitsandbytes import optim

    options: dict[str, Any] = {} if "lion" in name else {"eps": config.eps}
    made: torch.optim.Optimizer = getattr(optim, _BITSANDBYTES[name])(groups, lr=lr, betas=betas, **options)
    return made


def group(config: RunConfig, model: Any, parameters: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The parameters by what they share: their weight decay and their highest rate.

    Only matrices decay, and of those no embeddings: a norm's or a bias's size is no sign of overfitting.
    """
    rates = _rates(config.optim, parameters)
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters(recurse=False)
    }
    found: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in parameters.items():
        decays = parameter.ndim > 1 and id(parameter) not in embeddings
        peak = rates[name] * (config.lora.loraplus_lr_ratio if ".lora_B." in name else 1.0)
        found.setdefault((config.optim.weight_decay if decays else 0.0, peak), []).append(parameter)
    # By key alone: tensors have no order.
    return [{"params": found[key], "weight_decay": key[0], "peak_lr": key[1]} for key in sorted(found)]


def _rates(config: OptimConfig, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Each parameter's rate before the schedule and LoRA+."""
    inside = {name: within(module_of(name)) for name in parameters}
    find(config.lr_pattern, sorted({m for modules in inside.values() for m in modules}), "optim.lr_pattern")
    return {
        name: next((lr for p, lr in config.lr_pattern.items() if any(matches(p, m) for m in modules)), config.lr)
        for name, modules in inside.items()
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What the optimizer will still take on the device, at most: two numbers a weight, of its own width."""
    if optimizer.state:
        return 0
    args = getattr(optimizer, "args", None)
    width = 2 if getattr(args, "optim_bits", 32) == 8 else 8
    return sum(width * p.numel() for g in optimizer.param_groups for p in g["params"])


def rate(step: int, total: int, schedule: ScheduleConfig) -> float:
    """The learning rate of a step (from 0) as a part of the highest: a linear warm-up, then as `schedule.kind` says."""
    if schedule.kind == "constant":
        return 1.0
    warm = schedule.warmup_steps or math.ceil(total * schedule.warmup_ratio)
    if step < warm:
        return (step + 1) / warm
    if schedule.kind == "constant_with_warmup":
        return 1.0
    least = schedule.min_lr_ratio
    if schedule.kind == "inverse_sqrt":
        # Without a warm-up it has transformers' own scale.
        scale = warm or 10_000
        return max(least, math.sqrt(scale / (step + scale - warm)))
    along = (step - warm) / max(1, total - warm)
    if schedule.kind == "wsd":
        fall = math.ceil(total * schedule.decay_ratio)
        along = max(0.0, (step - (total - fall)) / max(1, fall))
    if schedule.kind == "linear":
        part = 1 - along
    elif schedule.kind == "polynomial":
        part = (1 - along) ** schedule.power
    else:
        part = 0.5 * (1 + math.cos(math.pi * along))
    return least + (1 - least) * part
