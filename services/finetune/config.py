"""How to train: frozen, typed, complete. Strict to and from JSON, as the orders (orders.py) that hold it are.

A config never names code: every value is a number, a text, or a key of a table in this library.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, cast

from services.finetune.errors import InvalidArgument, nearest

T = TypeVar("T")

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Optimizer = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "paged_lion_8bit",
    "sgd",
    "adafactor",
]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "polynomial", "wsd", "inverse_sqrt"]
Deepspeed = Literal[
    "", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero2_offload", "deepspeed_zero3", "deepspeed_zero3_offload"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model. `dtype` is what is computed in: auto is bfloat16 where the processor has it in hardware, else
    float32; float16 comes with a loss scale. Trainable weights are float32 whatever it is."""

    checkpoint: str = ""
    """Where the base comes from, as a hub id; a job's base_model takes precedence."""
    dtype: Dtype = "auto"
    freeze: tuple[str, ...] = ()
    """Method full: patterns (see LoraConfig) of modules that stay as they are, with all that is in them."""
    gradient_checkpointing: Literal["auto", "none", "full", "selective"] = "auto"
    """Which layers run forward again in the backward pass, instead of keeping what it needs (Chen et al. 2016): none, all,
    every `gradient_checkpointing_every`-th; auto does what memory needs. Losses are the same."""
    gradient_checkpointing_every: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """What `model.checkpoint` is assembled with to a vision-language model; a job's base_model takes precedence.

    Its modules are `vision_tower`, `multi_modal_projector` and `language_model`; what is trained of them is said by
    `method`, `lora` and `model.freeze`, as of any model's."""

    tower: str = ""
    """Where the vision tower comes from, as a hub id or a folder; empty for a model that sees nothing."""
    pretrained: str = ""
    """A projector that was trained before: a model's name, or another trainer's file or folder; empty is a fresh one."""
    pad_to_square: bool = False
    """Images are padded with the mean colour; else what is beside the middle square is cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021): W + alpha/rank * B A.

    Modules are named by patterns: `q_proj` is every module of that last name, `layers.0.mlp` every one whose name ends so,
    and with `*`, `?` or `[...]` it is the whole name that must match: `model.layers.1?.self_attn.*`.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ("all-linear",)
    """Patterns of linear layers, or all-linear: every one of the language model but the output head. Empty trains
    modules_to_save alone."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Another rank for modules by pattern; of several that match, the first counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Another alpha for modules by pattern."""
    use_rslora: bool = False
    """Scale by alpha/sqrt(rank) instead (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train the length of each row of W beside its direction (Liu et al. 2024)."""
    loraplus_lr_ratio: float = 1.0
    """B learns at so many times the rate of A (LoRA+, Hayou et al. 2024); its authors use 16."""
    modules_to_save: tuple[str, ...] = ()
    """Patterns of modules that are trained whole in place of adapters, and saved with them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Storage of the frozen base: bits 4 in blocks of 64 (Dettmers et al. 2023), bits 8 with outliers left out (Dettmers
    et al. 2022), 0 leaves it unquantised. `kind` and `double_quant` say how 4 bits are made."""

    bits: Literal[0, 4, 8] = 4
    kind: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """Where rows of a recipe come from: files, or a dataset of a hub. A job's datasets take precedence."""

    hub_id: str = ""
    hub: Literal["huggingface", "modelscope"] = "huggingface"
    subset: str = ""
    """The hub's name for a part of the dataset."""
    folder: str = ""
    """A folder of the hub's repository."""
    split: str = "train"
    files: tuple[str, ...] = ()
    """Files, or one folder of them, on the machine where the config is used."""
    format: str = ""
    """The row format; empty means that it is detected."""
    images: str = ""
    """The folder, on the machine where the config is used, that the paths of the rows' images are below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """How rows become blocks of tokens. An image counts as the tokens that the model makes of it."""

    template: str = ""
    """A prompt template's name; empty means the base model's own."""
    system: str = ""
    """System text for rows that have none."""
    max_length: int = 2048
    """Tokens in a block; longer rows are cut at the right."""
    pack: bool = True
    """Several rows share a block, without seeing each other."""
    max_rows: int = 0
    """Learn from so many rows, drawn by the seed; 0 means all."""
    sources: tuple[DataSource, ...] = ()
    weights: tuple[float, ...] = ()
    """How often the rows of each dataset are taken, in their order: 2 is twice, 0.5 a seeded half; empty is once each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizer. Those with 8bit or paged in their name, and lion, are bitsandbytes'; paged ones keep their state in
    host memory when a GPU's is short. Lion's authors use beta2 0.99 and a third of AdamW's rate."""

    name: Optimizer = "paged_adamw_32bit"
    lr: float = 2e-4
    beta1: float = 0.9
    """Of AdamW and Lion, as beta2."""
    beta2: float = 0.999
    eps: float = 1e-8
    """Of AdamW."""
    momentum: float = 0.0
    """Of SGD."""
    weight_decay: float = 0.0
    """Of matrices only: biases, norms and embeddings do not decay."""
    clip_norm: float = 1.0
    """Largest global L2 norm of the gradient; 0 does not clip."""
    lr_pattern: Mapping[str, float] = field(default_factory=dict)
    """Another rate, in place of lr, for modules by pattern (see LoraConfig) with all that is in them; of several that match,
    the first counts. The schedule and loraplus_lr_ratio apply to it as to lr."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Length and pace. One optimizer step reads batch_size * accumulate * ranks blocks, however many processes run."""

    epochs: int = 3
    max_steps: int = 0
    """Stop after so many optimizer steps; 0 means all epochs."""
    batch_size: int = 1
    accumulate: int = 16
    ranks: int = 1
    """For how many processes batch_size and accumulate were chosen: 8 in a recipe for eight GPUs."""
    kind: Schedule = "cosine"
    """How the rate falls after the warm-up, to min_lr_ratio * lr: cosine, linear, polynomial (of degree `power`), wsd (flat,
    then by a cosine in the last decay_ratio of all steps), inverse_sqrt; constant has no warm-up and
    constant_with_warmup does not fall."""
    warmup_ratio: float = 0.03
    """Part of all steps in which the rate climbs from 0."""
    warmup_steps: int = 0
    """Steps of warm-up in place of warmup_ratio; 0 leaves it to that."""
    min_lr_ratio: float = 0.0
    power: float = 1.0
    decay_ratio: float = 0.1
    seed: int = 0
    deterministic: bool = False
    """On a GPU: sum in a fixed order, slower, so that a run that was cut ends bit-identical. Without one it is always so."""

    @property
    def blocks_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportConfig:
    """What is told and kept while training."""

    log_every: int = 10
    """Steps between metric events."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always makes one."""
    checkpoint_epochs: int = 0
    """Epochs between further checkpoints; 0 makes none."""
    keep_last: int = 0
    """Checkpoints that stay named, newest first; 0 keeps all."""
    keep_best: bool = False
    """Keep the checkpoint of the least validation loss (of the least training loss where nothing is validated), save one
    whenever that falls, and make it the job's result in place of the last."""
    sample_every: int = 0
    """Steps between answers to `prompts`; 0 means only at the end."""
    prompts: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    """What the prompts are about: a file's path in the job's datasets, for all of them, or one for each ("" is none)."""
    system: str = ""
    """System text for `prompts` alone; empty means data.system."""
    sample_tokens: int = 64
    measures: tuple[Literal["mmlu"], ...] = ()
    """Benchmarks to run beside training."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Whom else to tell, through their own libraries; where they listen is said by their own environment variables."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Looking at rows that are not learned from. Without `ratio` or datasets of a job for it, nothing is looked at."""

    ratio: float = 0.0
    """Part of the distinct rows that is held out, drawn by the seed; rows that are equal stay together."""
    every: int = 0
    """Optimizer steps between looks; 0 looks after each epoch. The last step is always followed by a look."""
    patience: int = 0
    """End after so many looks in a row without a lower loss; 0 goes on to the last step."""
    min_delta: float = 0.0
    """A loss is lower only if it is by more than this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """How the processes of one run share the work. Their number changes no step: it reads the same blocks, dealt out."""

    deepspeed: Deepspeed = ""
    """A preset's name. Empty is the cheapest way that fits: whole copies of the model that add up their gradients, else
    frozen layers dealt out under the fused kernels, or where these do not cover the model the lowest stage of ZeRO
    (Rajbhandari et al. 2020) with which model and optimizer fit the GPUs. deepspeed_zero3 is the fused kernels' own as well
    where they cover the model, and DeepSpeed's elsewhere."""
    processes: int = 0
    """Processes on a machine; 0 is one a GPU, and one where there is none."""
    nodes: int = 1
    """Machines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides the numbers of a training run, apart from the base and the data themselves."""

    method: Literal["full", "lora", "qlora", "int8_lora"] = "qlora"
    model: ModelConfig = field(default_factory=ModelConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def matches(pattern: str, module: str) -> bool:
    """Whether a pattern (see LoraConfig) means the module of this whole name."""
    if re.search(r"[*?\[]", pattern):
        return fnmatchcase(module, pattern)
    return module == pattern or module.endswith("." + pattern)


def to_json(config: object) -> Any:
    """A config as plain data, with every field written out."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [to_json(item) for item in config]
    if isinstance(config, Mapping):
        return {key: to_json(value) for key, value in config.items()}
    return config


def from_json(cls: type[T], data: Any, path: str = "") -> T:
    """Read a config of class `cls`.

    Raises InvalidArgument: CONFIG_KEY_UNKNOWN, CONFIG_KEY_MISSING or CONFIG_VALUE_INVALID, naming the dotted key.
    """
    return cast(T, _read(cls, data, path))


def override(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """`config` with values changed by dotted key, as ``{"optim.lr": 1e-3}``; errors as from_json."""
    data = to_json(config)
    for key, value in changes.items():
        *sections, last = key.split(".")
        node = data
        for section in sections:
            node = node.get(section) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise InvalidArgument(
                f"unknown config key {key!r}{nearest(key, keys(config))}",
                reason="CONFIG_KEY_UNKNOWN",
                metadata={"key": key},
            )
        node[last] = value
    return from_json(type(config), data)


def keys(config: object, prefix: str = "") -> list[str]:
    """All dotted keys of a config, sections left out."""
    found: list[str] = []
    for f in dataclasses.fields(cast(Any, config)):
        value = getattr(config, f.name)
        inner = dataclasses.is_dataclass(value)
        found += keys(value, f"{prefix}{f.name}.") if inner else [prefix + f.name]
    return found


def _read(kind: Any, data: Any, path: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(cast(type, kind), data, path)
    if origin is Literal:
        value = int(data) if isinstance(data, float) and data.is_integer() else data
        if isinstance(value, bool) or value not in args:
            raise _invalid(path, data, "one of " + ", ".join(repr(a) for a in args))
        return value
    if origin is types.UnionType:
        return None if data is None else _read(next(a for a in args if a is not type(None)), data, path)
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise _invalid(path, data, "a list")
        return tuple(_read(args[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if origin is Mapping:
        if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
            raise _invalid(path, data, "an object")
        return {key: _read(args[1], value, f"{path}.{key}") for key, value in data.items()}
    return _read_scalar(kind, data, path)


def _read_dataclass(cls: type, data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise _invalid(path, data, "an object")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    dot = f"{path}." if path else ""
    for key in data:
        if key not in known:
            raise InvalidArgument(
                f"unknown config key {dot + str(key)!r}{nearest(str(key), list(known))}",
                reason="CONFIG_KEY_UNKNOWN",
                metadata={"key": dot + str(key)},
            )
    for name, f in known.items():
        no_default = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in data and no_default:
            raise InvalidArgument(
                f"config key {dot + name!r} is missing", reason="CONFIG_KEY_MISSING", metadata={"key": dot + name}
            )
    return cls(**{key: _read(hints[key], value, dot + key) for key, value in data.items()})


def _read_scalar(kind: Any, data: Any, path: str) -> Any:
    # JSON and protobuf Struct have one kind of number: 3.0 is the integer 3, and 1 is the float 1.0.
    if kind is int and isinstance(data, int | float) and not isinstance(data, bool) and data == int(data):
        return int(data)
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        return float(data)
    if kind in (str, bool) and isinstance(data, kind):
        return data
    raise _invalid(path, data, {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind])


def _invalid(path: str, data: Any, wanted: str) -> InvalidArgument:
    return InvalidArgument(
        f"config key {path!r} must be {wanted}, not {data!r}",
        reason="CONFIG_VALUE_INVALID",
        metadata={"key": path, "value": repr(data)[:200]},
    )
