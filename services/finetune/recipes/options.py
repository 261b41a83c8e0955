"""XTuner's keys where ours are wanted: what `--cfg-options` may name beside the keys of RunConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.finetune.config import RunConfig, keys, override
from services.finetune.errors import InvalidArgument
from services.finetune.recipes.tables import steps

_SAME = {
    "model.checkpoint": "pretrained_model_name_or_path model.llm.pretrained_model_name_or_path",
    "vision.tower": "visual_encoder_name_or_path model.visual_encoder.pretrained_model_name_or_path",
    "vision.pretrained": "pretrained_pth model.pretrained_pth",
    "vision.pad_to_square": "pad_image_to_square train_dataloader.dataset.pad_image_to_square",
    "data.max_length": "max_length train_dataset.max_length train_dataloader.dataset.max_length",
    "data.pack": "pack_to_max_length train_dataset.pack_to_max_length train_dataloader.dataset.pack_to_max_length",
    "data.max_rows": "max_dataset_length train_dataset.max_dataset_length",
    "optim.lr": "lr optim_wrapper.optimizer.lr",
    "optim.weight_decay": "weight_decay optim_wrapper.optimizer.weight_decay",
    "optim.clip_norm": "max_norm optim_wrapper.clip_grad.max_norm",
    "schedule.batch_size": "batch_size train_dataloader.batch_size",
    "schedule.accumulate": "accumulative_counts optim_wrapper.accumulative_counts",
    "schedule.epochs": "max_epochs train_cfg.max_epochs",
    "schedule.warmup_ratio": "warmup_ratio",
    "schedule.seed": "randomness.seed",
    "lora.rank": "model.lora.r lora.r",
    "lora.alpha": "model.lora.lora_alpha lora.lora_alpha",
    "lora.dropout": "model.lora.lora_dropout lora.lora_dropout",
    "lora.targets": "model.lora.target_modules lora.target_modules",
    "lora.use_rslora": "model.lora.use_rslora",
    "lora.use_dora": "model.lora.use_dora",
    "lora.modules_to_save": "model.lora.modules_to_save",
    "report.system": "SYSTEM",
    "report.prompts": "evaluation_inputs",
    "report.keep_last": "save_total_limit default_hooks.checkpoint.max_keep_ckpts",
}
_OURS = {theirs: ours for ours, listed in _SAME.items() for theirs in listed.split()}
# Counted by XTuner in iterations.
_INTERVALS = {
    "evaluation_freq": "report.sample_every",
    "save_steps": "report.checkpoint_every",
    "default_hooks.checkpoint.interval": "report.checkpoint_every",
    "default_hooks.logger.interval": "report.log_every",
}
_BETAS = ("betas", "optim_wrapper.optimizer.betas")


def is_ours(key: str) -> bool:
    """Whether a dotted key is one of RunConfig's."""
    return key in keys(RunConfig())


def translate(config: RunConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` to `config` by our keys only. XTuner's become ours; its intervals become optimizer steps.

    InvalidArgument (CONFIG_KEY_UNKNOWN, CONFIG_VALUE_INVALID), as override raises them.
    """
    ours = {_OURS.get(key, key): value for key, value in changes.items() if key not in _INTERVALS and key not in _BETAS}
    for key in _BETAS:
        if key in changes:
            ours |= _betas(key, changes[key])
    accumulate = override(config, ours).schedule.accumulate
    for key, name in _INTERVALS.items():
        if key in changes:
            value = changes[key]
            whole = isinstance(value, int) and not isinstance(value, bool)
            ours[name] = steps(value, accumulate) if whole else value
    override(config, ours)
    return ours


def _betas(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise InvalidArgument(f"config key {key!r} must be a list of two numbers", reason="CONFIG_VALUE_INVALID")
    return {"optim.beta1": value[0], "optim.beta2": value[1]}
