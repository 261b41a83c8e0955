"""A base model's sizes, as far as memory and time hang on them: read from its config.json and its files' headers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from services.finetune.errors import FailedPrecondition
from services.finetune.modules import in_memory, is_seeing
from services.finetune.towers import Tower, read_tower

MAX_HEADER_BYTES = 64 << 20
FUSED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear layers of one leaf name, over all decoder layers together; sizes are of one."""

    count: int
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        return self.count * self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Shape:
    """A base model, as far as memory and time hang on it."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_size: int
    vocabulary: int
    parameters: int
    linears: Mapping[str, Linear]
    normed_heads: bool = False
    modules: Mapping[str, int] = field(default_factory=dict)
    """Parameters of every module that has some of its own, by its whole name."""
    tower: Tower | None = None
    """Of a model that sees; `linears` are those of the language model alone."""


def read_shape(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]]) -> Shape:
    """A model's shape from its config.json and the shapes of its tensors. FailedPrecondition (SHAPE_UNKNOWN)."""
    text = config.get("text_config") or config
    try:
        layers, hidden, heads = (text[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        vocabulary = text["vocab_size"]
    except KeyError as error:
        raise FailedPrecondition(f"the base's config.json has no {error}", reason="SHAPE_UNKNOWN") from error
    linears: dict[str, Linear] = {}
    tied, tower = (
        bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        read_tower(config, tensors),
    )
    parameters, modules = 0, dict[str, int]()
    for name, shape in tensors.items():
        if tied and name.endswith("lm_head.weight"):
            continue
        parameters += math.prod(shape)
        module = in_memory(name, config).rpartition(".")[0]
        modules[module] = modules.get(module, 0) + math.prod(shape)
        if is_seeing(name):
            continue
        # What has a row for each token is the embedding or the head.
        if name.endswith(".weight") and len(shape) == 2 and vocabulary not in shape and re.search(r"\.\d+\.", name):
            leaf = name.split(".")[-2]
            known = linears.get(leaf, Linear(0, shape[1], shape[0]))
            linears[leaf] = dataclasses.replace(known, count=known.count + 1)
    if not linears:
        raise FailedPrecondition("the base's files hold no linear layers", reason="SHAPE_UNKNOWN")
    return Shape(
        architecture=_architecture(config, text),
        layers=layers,
        hidden=hidden,
        intermediate=text.get("intermediate_size") or 4 * hidden,
        heads=heads,
        head_size=text.get("head_dim") or hidden // heads,
        vocabulary=vocabulary,
        parameters=parameters,
        linears=linears,
        normed_heads=any(name.endswith("q_norm.weight") for name in tensors),
        modules=modules,
        tower=tower,
    )


def _architecture(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The class of the language model. The config.json of a model that sees names it by its type alone."""
    if text is config:
        return str((config.get("architectures") or [""])[0])
    return next((n for n in FUSED if n.removesuffix("ForCausalLM").lower() == text.get("model_type", "llama")), "")


def tensor_shapes(read: Callable[[int, int], bytes]) -> dict[str, list[int]]:
    """The shapes in a safetensors file, which begins with 8 bytes of its header's length and the header, JSON. `read` gives
    (offset, length) of it. FailedPrecondition (SHAPE_UNKNOWN)."""
    try:
        length = int.from_bytes(read(0, 8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("no header is so long")
        header = json.loads(read(8, length))
        return {name: [int(n) for n in one["shape"]] for name, one in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FailedPrecondition("the base has a file of weights without a header", reason="SHAPE_UNKNOWN") from error
