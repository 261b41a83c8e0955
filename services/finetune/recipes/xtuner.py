"""XTuner config text to a RunConfig: what it asks for is taken over, told to be different, or refused by line.

The text is read by python_text.py and never run. Read are the structures that XTuner itself acts on (model,
train_dataloader, optim_wrapper, …), of XTuner 0.1.9 to 0.2.0; variables matter only where a structure uses them.
XTuner counts iterations, one micro-batch each; we count optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.finetune.config import RunConfig, override
from services.finetune.errors import InvalidArgument
from services.finetune.recipes.python_text import Neighbour, Table, read_python
from services.finetune.recipes.xtuner_model import read_dataset, read_tokenizer, read_weights
from services.finetune.recipes.xtuner_parts import Part, Reading
from services.finetune.recipes.xtuner_run import read_hooks, read_optimizer, read_pace, read_runtime
from services.finetune.recipes.xtuner_vision import read_sight

# What mmengine's runner takes beside that; none of it is kept apart from None.
RUNNER_KEYS = [
    "strategy",
    "runner_type",
    "auto_scale_lr",
    "sync_bn",
    "model_wrapper_cfg",
    "find_unused_parameters",
    "compile",
    "cfg",
    "data_preprocessor",
    "test_cfg",
    "val_cfg",
]


@dataclass(frozen=True, slots=True)
class XtunerConfig:
    """A config that was read. `notes` tell, with lines, what is done in another way than XTuner does it."""

    config: RunConfig
    notes: tuple[str, ...]
    work_dir: str = ""


def no_neighbour(path: str) -> str:
    """For texts that stand alone."""
    raise InvalidArgument(f"{path} stands beside the config, and only the config is here", reason="CONFIG_SYNTAX")


def read_xtuner(
    text: str, file: str, given: Mapping[str, Any] | None = None, neighbour: Neighbour = no_neighbour
) -> XtunerConfig:
    """The RunConfig of a text of XTuner's kind. `given` changes it first, by variable or by dotted key.

    InvalidArgument: CONFIG_SYNTAX, with line and column; CONFIG_UNSUPPORTED, with a violation for each setting that cannot
    be honoured; CONFIG_KEY_UNKNOWN for a key of `given` that is not in the text; CONFIG_VALUE_INVALID.
    """
    given = given or {}
    plain = {key: _listed(value) for key, value in given.items() if "." not in key}
    names = read_python(text, file, plain, neighbour)
    for key, value in given.items():
        _change(names, key, value, file)
    reading = Reading(file, str(names.items.get("bot_name", "")))
    top = Part(reading, "", names)
    _huggingface(top) if top.take("framework") == "huggingface" else _mmengine(top)
    for key in RUNNER_KEYS:
        if key in names.items and names.items[key] is not None and key not in reading.taken:
            top.blame(key, "is not supported")
    reading.refuse()
    return XtunerConfig(override(RunConfig(), reading.changes), tuple(reading.notes), top.text("work_dir"))


# ---------------------------------------------------------------------------------------------- XTuner's own trainer


def _mmengine(top: Part) -> None:
    model = top.part("model")
    loader = top.part("train_dataloader")
    optim = top.part("optim_wrapper")
    if model is None or loader is None or optim is None:
        top.blame("model", "a config needs model, train_dataloader and optim_wrapper, or framework = 'huggingface'")
        return
    sees = model.one_of("SupervisedFinetune", "LLaVAModel") == "LLaVAModel"
    model.idle("use_varlen_attn")
    if not model.flag("use_activation_checkpointing", True):
        model.set("model.gradient_checkpointing", "none")
    for key in ("peft_model", "max_position_embeddings"):
        model.only(key, None)
    llm = read_sight(model) if sees else _language_model(model)
    model.close()
    if llm is None:
        return
    accumulate = read_optimizer(optim)
    read_tokenizer(top, llm)
    loader.idle("num_workers", "persistent_workers", "pin_memory", "prefetch_factor")
    loader.set("schedule.batch_size", loader.whole("batch_size", 1))
    _sampler(loader)
    read_dataset(loader)
    loader.close()
    read_pace(top)
    read_hooks(top, accumulate)
    read_runtime(top)
    top.reading.taken |= top.seen


def _language_model(model: Part) -> Part | None:
    llm, lora = model.part("llm"), model.part("lora")
    if llm is None:
        model.blame("llm", "is missing")
    else:
        read_weights(llm, lora)
    return llm


def _sampler(loader: Part) -> None:
    sampler, collate = loader.part("sampler"), loader.part("collate_fn")
    if sampler is not None:
        if sampler.one_of("DefaultSampler", "LengthGroupedSampler") == "LengthGroupedSampler":
            # It spares padding, of which there is none here (docs/decisions/0066).
            sampler.idle("length_property", "per_device_batch_size")
            sampler.note("type", "rows are shuffled, whatever their lengths: no padding is computed")
        else:
            sampler.only("shuffle", True)
        sampler.close()
    if collate is not None:
        collate.one_of("default_collate_fn")
        collate.idle("use_varlen_attn")
        collate.close()


# ---------------------------------------------------------------------------------------------- Hugging Face's trainer


def _huggingface(top: Part) -> None:
    """framework = 'huggingface': counts optimizer steps, as we do."""
    model, arguments = top.part("model"), top.part("training_args")
    if model is None or arguments is None:
        top.blame("model", "a config of framework 'huggingface' needs model and training_args")
        return
    top.idle("trainer", "framework")
    read_weights(model, top.part("lora"))
    read_tokenizer(top, model)
    read_dataset(top, "train_dataset")
    arguments.one_of("TrainingArguments")
    arguments.only("do_train", True)
    arguments.only("save_strategy", "steps")
    arguments.idle(
        "ddp_find_unused_parameters", "dataloader_num_workers", "report_to", "output_dir", "overwrite_output_dir"
    )
    _named(arguments, "lr_scheduler_type", "linear", "schedule.kind", {name: name for name in _SCHEDULES})
    _named(arguments, "optim", "adamw_torch", "optim.name", _OPTIMIZERS)
    if arguments.take("gradient_checkpointing") is not None:
        whole = arguments.flag("gradient_checkpointing", False)
        arguments.set("model.gradient_checkpointing", "full" if whole else "none")
    if arguments.flag("bf16", False):
        arguments.set("model.dtype", "bfloat16")
    if arguments.flag("fp16", False):
        arguments.note("fp16", "becomes model.dtype auto: bfloat16 where the processor has it, else float32")
    for key, ours, read, default in _ARGUMENTS:
        arguments.set(ours, read(arguments, key, default))
    if arguments.take("seed") is not None:
        arguments.set("schedule.seed", arguments.whole("seed", 0))
    arguments.close()


_SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "lion_32bit": "lion",
    "lion_8bit": "lion_8bit",
    "paged_lion_8bit": "paged_lion_8bit",
    "sgd": "sgd",
}


def _named(part: Part, key: str, default: str, ours: str, names: Mapping[str, str]) -> None:
    name = part.text(key, default)
    if name not in names:
        part.blame(key, f"can only be {' or '.join(names)}")
    else:
        part.set(ours, names[name])


_ARGUMENTS: Sequence[tuple[str, str, Callable[[Part, str, Any], Any], float]] = (
    ("learning_rate", "optim.lr", Part.number, 5e-5),
    ("weight_decay", "optim.weight_decay", Part.number, 0.0),
    ("adam_beta1", "optim.beta1", Part.number, 0.9),
    ("adam_beta2", "optim.beta2", Part.number, 0.999),
    ("adam_epsilon", "optim.eps", Part.number, 1e-8),
    ("max_grad_norm", "optim.clip_norm", Part.number, 1.0),
    ("warmup_ratio", "schedule.warmup_ratio", Part.number, 0.0),
    ("warmup_steps", "schedule.warmup_steps", Part.whole, 0),
    ("per_device_train_batch_size", "schedule.batch_size", Part.whole, 8),
    ("gradient_accumulation_steps", "schedule.accumulate", Part.whole, 1),
    ("num_train_epochs", "schedule.epochs", Part.whole, 3),
    ("logging_steps", "report.log_every", Part.whole, 500),
    ("save_steps", "report.checkpoint_every", Part.whole, 500),
    ("save_total_limit", "report.keep_last", Part.whole, 0),
)


# ---------------------------------------------------------------------------------------------- --cfg-options


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _change(names: Table, key: str, value: Any, file: str) -> None:
    """Put a value at a dotted key, as `optim_wrapper.optimizer.lr`; it must be there, or its table."""
    *path, last = key.split(".")
    at: Any = names
    for part in path:
        at = at.items.get(part) if isinstance(at, Table) else at[int(part)] if _index(at, part) else None
    if isinstance(at, Table) and (path or last in at.items):
        at.put(last, value, at.lines.get(last, at.line))
        return
    raise InvalidArgument(
        f"{file} binds no {key}, and it is no key of ours", reason="CONFIG_KEY_UNKNOWN", metadata={"key": key}
    )


def _index(at: Any, part: str) -> bool:
    return isinstance(at, list | tuple) and part.isdigit() and int(part) < len(at)
