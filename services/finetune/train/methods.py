"""What is trained: LoRA on a frozen base, or every weight; modules are named by patterns (config.LoraConfig says how)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from services.finetune.config import LoraConfig, RunConfig, matches
from services.finetune.errors import FailedPrecondition, InvalidArgument, nearest
from services.finetune.modules import in_memory
from services.finetune.train.seeing import in_language, sees

ALL_LINEAR = "all-linear"
_WILD = re.compile(r"[*?\[]")


def adapt(model: Any, config: RunConfig) -> Any:
    """A causal model with fresh LoRA weights (float32). InvalidArgument (CONFIG_VALUE_INVALID) for modules that it has
    not; FailedPrecondition (MODEL_NOT_TRAINABLE) for what only a GPU can do."""
    import peft

    if config.lora.use_dora and config.quant.bits == 8 and not torch.cuda.is_available():
        # PEFT 0.21 moves a weight on a CPU to look at it, and what arrives has lost its scales.
        raise FailedPrecondition(
            "DoRA over an 8-bit base needs a GPU; use the method lora or qlora", reason="MODEL_NOT_TRAINABLE"
        )
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = config.lora
    # PEFT takes any name that ends so, "norm" for "layernorm" too: it is given whole names.
    saved = find(lora.modules_to_save, [n for n, _ in model.named_modules() if n], "lora.modules_to_save")
    _check_saved(model, saved)
    targets, targeted = _targets(model, lora)
    find(lora.rank_pattern, targeted, "lora.rank_pattern")
    find(lora.alpha_pattern, targeted, "lora.alpha_pattern")
    adapter = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.dropout,
        target_modules=targets,
        rank_pattern={_regex(p): rank for p, rank in lora.rank_pattern.items()},
        alpha_pattern={_regex(p): alpha for p, alpha in lora.alpha_pattern.items()},
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=saved or None,
        task_type="CAUSAL_LM",
    )
    # Fresh LoRA weights depend on the seed alone, not on what ran before.
    torch.manual_seed(config.schedule.seed)
    try:
        wrapped = peft.get_peft_model(model, adapter)
    except ValueError as error:
        raise _invalid("lora.targets", str(error)) from error
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def unfreeze(model: Any, config: RunConfig, dtype: torch.dtype) -> Any:
    """A causal model, loaded in float32, of which everything is trained but what `model.freeze` names. The large frozen
    weights become `dtype`, in which they are used anyway. InvalidArgument (CONFIG_VALUE_INVALID)."""
    model.config.use_cache = False
    frozen = find(config.model.freeze, [n for n, _ in model.named_modules() if n], "model.freeze")
    for name in frozen:
        for module in model.get_submodule(name).modules():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
                if isinstance(module, nn.Linear | nn.Embedding):
                    parameter.data = parameter.data.to(dtype)
    if not any(p.requires_grad for p in model.parameters()):
        raise _invalid("model.freeze", "nothing is left to train")
    return model


def check_writable(model: Any, directory: Path) -> None:
    """FailedPrecondition (MODEL_NOT_TRAINABLE) if trained weights could not be written back under the names that the base's
    files have: transformers renames some models' tensors, or puts several into one, while it loads them."""
    from safetensors import safe_open

    names, config = set[str](), model.config.to_dict()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(map(partial(in_memory, config=config), file.keys()))
    gone = [n for n, p in model.named_parameters() if p.requires_grad and not {n, n.partition(".")[2]} & names]
    if gone:
        raise FailedPrecondition(
            f"the base's files have no {gone[0]}, so what full training makes of it could not be written back; use lora",
            reason="MODEL_NOT_TRAINABLE",
        )


def find(patterns: Iterable[str], names: Collection[str], key: str) -> list[str]:
    """The names that match, in their order. InvalidArgument (CONFIG_VALUE_INVALID) for a pattern that matches none."""
    found: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            known = list(names) if "." in pattern else sorted({n.rpartition(".")[2] for n in names})
            raise _invalid(key, f"the model has no module for {pattern!r}{nearest(pattern, known)}")
        found.update(hits)
    return [name for name in names if name in found]


def module_of(parameter: str) -> str:
    """The base's name of the module that a parameter is of, or was added to: without what PEFT puts around it."""
    name = re.sub(r"\.(lora_\w+|modules_to_save)\.default(?=\.)|\.(base_layer|original_module)(?=\.)", "", parameter)
    return name.removeprefix("base_model.model.").rpartition(".")[0]


def within(module: str) -> list[str]:
    """A module's name, and those of all that it is in."""
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def _targets(model: Any, lora: LoraConfig) -> tuple[str | list[str], list[str]]:
    """(what PEFT is told, the whole names of all that are meant)."""
    from peft.utils.constants import DUMMY_TARGET_MODULES
    from transformers.pytorch_utils import Conv1D

    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    named = find([t for t in lora.targets if t != ALL_LINEAR], linear, "lora.targets")
    if ALL_LINEAR in lora.targets:
        head = model.get_output_embeddings()
        every = [n for n in linear if in_language(model, n) and model.get_submodule(n) is not head]
        named += [n for n in every if n not in named]
    if lora.targets == (ALL_LINEAR,) and not sees(model):
        return ALL_LINEAR, named
    if not lora.targets:
        if not lora.modules_to_save:
            raise _invalid("lora.targets", "nothing is left to train: name some, or modules_to_save")
        return DUMMY_TARGET_MODULES, []  # PEFT's name for none
    if ALL_LINEAR in lora.targets or any(_WILD.search(t) or "." in t for t in lora.targets):
        return named, named
    return list(lora.targets), named  # every reader of adapters knows last names


def _regex(pattern: str) -> str:
    """A pattern in PEFT's terms, which puts ``(.*\\.)?`` before it."""
    if not _WILD.search(pattern):
        return re.escape(pattern)
    pieces = re.split(r"(\*|\?|\[!?[^\]]+\])", pattern)
    wild = {"*": ".*", "?": "."}
    made = [wild.get(p) or (p.replace("[!", "[^") if n % 2 else re.escape(p)) for n, p in enumerate(pieces)]
    regex = "^" + "".join(made)
    try:
        re.compile(regex)
    except re.error as error:
        raise _invalid("lora.rank_pattern", f"{pattern!r} is no pattern: {error}") from error
    return regex


def _check_saved(model: Any, saved: Sequence[str]) -> None:
    for name in saved:
        if not all(p.is_floating_point() for p in model.get_submodule(name).parameters()):
            raise _invalid("lora.modules_to_save", f"{name} is quantised, so it cannot be trained whole; use lora")


def _invalid(key: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"config key {key!r}: {why}", reason="CONFIG_VALUE_INVALID", metadata={"key": key})
