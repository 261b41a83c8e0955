"""What a LoRA adapter in PEFT's format does to each tensor of its base.

LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024), LoRA on embeddings and on biases, ranks and
alphas by pattern, modules saved whole; merged as PEFT's layers do it, in float32. The adapter's tensors stay in the store
until their turn comes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from services.finetune.convert.adapter import PREFIX
from services.finetune.convert.shards import NAMES, Stored
from services.finetune.errors import InvalidArgument

Config = Mapping[str, Any]

_ALIEN = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "megatron_config", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
)  # fmt: skip
"""Settings of adapter_config.json that make another formula of it."""
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that take something out of the base: their adapters belong to that, until PEFT converts them at saving."""
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "added",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "lengths",
    ".lora_magnitude_vector.weight": "lengths",
    ".base_layer.weight": "weight",
    ".base_layer.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}
"""What a tensor is of its module, by the end of its name; the first that fits counts."""
_HEADS = ("lm_head", "embed_out")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in")


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one base weight W of shape [out, in], or [in, out] if it is `transposed`.

    W' = W + scale * b a, with a [rank, in] and b [out, rank]; with `lengths` [out] each row of W' is stretched to its
    length. `added` times scale is added to a bias. `replaced` stands in W's place to begin with.
    """

    replaced: Stored | None = None
    a: Stored | None = None
    b: Stored | None = None
    lengths: Stored | None = None
    added: Stored | None = None
    scale: float = 1.0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Changes:
    """All of an adapter: changes by the base's names. `tensors` are the base's; where the head was tied to the embeddings
    and no longer is (`untied`), its own is among them."""

    by_name: Mapping[str, Change]
    tensors: Sequence[Stored]
    untied: bool


def check_config(config: Config) -> None:
    """InvalidArgument (ADAPTER_UNSUPPORTED) naming what cannot be merged exactly."""
    odd = [k for k in _ALIEN if config.get(k)]
    how = config.get("init_lora_weights")
    if isinstance(how, str) and how.startswith(_RESIDUAL):
        odd.append(f"init_lora_weights={how}: save it converted, with path_initial_model_for_weight_conversion")
    if config.get("peft_type") != "LORA" or odd:
        raise InvalidArgument(
            f"only LoRA adapters can be merged, not {', '.join(odd) or config.get('peft_type')}",
            reason="ADAPTER_UNSUPPORTED",
        )


def read_changes(adapter: Iterable[Stored], config: Config, base: Sequence[Stored], model: Config) -> Changes:
    """The changes of an adapter with these tensors and this adapter_config.json, to a base with these and this config.json.

    Where a tied head or the embeddings it is tied to are changed, PEFT computes with both apart: so they become. With
    ensure_weight_tying they are changed alike, and stay one. InvalidArgument (ADAPTER_UNSUPPORTED, ADAPTER_MISMATCH,
    ADAPTER_INCOMPLETE).
    """
    check_config(config)
    bare, rest = _bare(adapter, base)
    parts, tensors, tie = _by_module(rest), list(base), _tie(base, model)
    untied = False
    if tie is not None and {tie.head, tie.module} & parts.keys():
        untied = not config.get("ensure_weight_tying")
        if not tie.stored and untied:
            tensors.append(tie.embeddings.named(f"{tie.head}.weight"))
        elif not tie.stored and tie.head in parts:
            parts.setdefault(tie.module, parts.pop(tie.head))
    known = {t.name: t for t in tensors}
    changes = {name: Change(replaced=tensor) for name, tensor in bare.items()}
    for module, found in sorted(parts.items()):
        changes |= _module(module, found, config, known)
    if not changes:
        raise _incomplete("the adapter holds no weights", "")
    return Changes(changes, tensors, untied)


def _bare(adapter: Iterable[Stored], base: Sequence[Stored]) -> tuple[dict[str, Stored], list[Stored]]:
    """(tensors of modules saved whole that are neither their weight nor their bias, as a tower's class embedding; the
    rest). InvalidArgument (ADAPTER_MISMATCH)."""
    known = {PREFIX + t.name: t for t in base if not t.name.endswith((".weight", ".bias"))}
    bare, rest = dict[str, Stored](), list[Stored]()
    for tensor in adapter:
        if tensor.name in known:
            _check_there(tensor, known[tensor.name], tensor.shape)
            bare[tensor.name.removeprefix(PREFIX)] = tensor
        else:
            rest.append(tensor)
    return bare, rest


@dataclass(frozen=True, slots=True)
class _Tie:
    """The embeddings, of the module `module`, and the module of the head that they are the weight of; some models' files
    hold it once more (`stored`)."""

    embeddings: Stored
    module: str
    head: str
    stored: bool


def _tie(base: Sequence[Stored], model: Config) -> _Tie | None:
    """None where the head has a weight of its own."""
    modules = {t.name.removesuffix(".weight"): t for t in base if t.name.endswith(".weight")}
    heads = [m for m in modules if m.rpartition(".")[2] in _HEADS]
    embeddings = [m for m in modules if m.rpartition(".")[2] in _EMBEDDINGS]
    if len(embeddings) != 1 or (heads and not model.get("tie_word_embeddings")):
        return None
    return _Tie(modules[embeddings[0]], embeddings[0], heads[0] if heads else "lm_head", bool(heads))


def _by_module(adapter: Iterable[Stored]) -> dict[str, dict[str, Stored]]:
    """An adapter's tensors by module, and by the words of _PARTS."""
    found: dict[str, dict[str, Stored]] = {}
    for tensor in adapter:
        end = next((end for end in _PARTS if tensor.name.endswith(end)), "")
        if not end or not tensor.name.startswith(PREFIX) or tensor.dtype not in NAMES:
            raise _mismatch(tensor.name, "it is no part of a LoRA adapter")
        found.setdefault(tensor.name.removeprefix(PREFIX).removesuffix(end), {})[_PARTS[end]] = tensor
    return found


def _module(module: str, found: Mapping[str, Stored], config: Config, base: Mapping[str, Stored]) -> dict[str, Change]:
    """The changes of one module's weight and bias."""
    changes: dict[str, Change] = {}
    for word in ("weight", "bias"):
        if word in found:
            _check_there(found[word], base.get(f"{module}.{word}"), found[word].shape)
            changes[f"{module}.{word}"] = Change(replaced=found[word])
    a, b = found.get("a"), found.get("b")
    if not found.keys() - {"weight", "bias"}:
        return changes
    weight = base.get(f"{module}.weight")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise _incomplete(f"{module} lacks one of its halves, or they do not fit each other", module)
    if weight is None or weight.dtype not in NAMES:
        raise _mismatch(a.name, "the base has no weight for it")
    scale, shape = _scale(module, a.shape[0], config), (b.shape[0], a.shape[1])
    # Embeddings keep [in, out]; so do some models' layers, which PEFT marks for all of an adapter at once.
    transposed = "lora_embedding" in a.name or (
        weight.shape != shape or (shape[0] == shape[1] and bool(config.get("fan_in_fan_out")))
    )
    _check_there(a, weight, shape[::-1] if transposed else shape)
    if bool(config.get("use_dora")) != ("lengths" in found):
        raise _incomplete(f"{module} has lengths of rows, or lacks them, unlike use_dora of its config", module)
    if (lengths := found.get("lengths")) is not None and lengths.count != shape[0]:
        raise _mismatch(lengths.name, f"{shape[0]} rows need as many lengths")
    first = changes.get(f"{module}.weight", Change())
    changes[f"{module}.weight"] = replace(first, a=a, b=b, scale=scale, transposed=transposed, lengths=lengths)
    if (added := found.get("added")) is not None:
        _check_there(added, base.get(f"{module}.bias"), added.shape)
        first = changes.get(f"{module}.bias", Change())
        changes[f"{module}.bias"] = replace(first, added=added, scale=scale)
    return changes


def _scale(module: str, rank: int, config: Config) -> float:
    """alpha / rank, or with rsLoRA alpha / sqrt(rank). InvalidArgument (ADAPTER_INCOMPLETE) if the config says another
    rank."""
    wanted = by_pattern(config.get("rank_pattern"), module, config["r"])
    if rank != wanted:
        raise _incomplete(f"{module} has rank {rank}, its config says {wanted}", module)
    alpha = float(by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """What the first regular expression that fits the end of a module's name stands for, as PEFT reads rank_pattern."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise InvalidArgument(
                f"adapter_config.json: {pattern!r} is no regular expression: {error}", reason="ADAPTER_UNSUPPORTED"
            ) from error
    return otherwise


def _check_there(tensor: Stored, base: Stored | None, shape: tuple[int, ...]) -> None:
    if base is None:
        raise _mismatch(tensor.name, "the base has no weight for it")
    if base.shape != shape:
        raise _mismatch(tensor.name, f"the base's weight has shape {list(base.shape)}, not {list(shape)}")


def _mismatch(name: str, why: str) -> InvalidArgument:
    return InvalidArgument(
        f"the adapter's {name} cannot be merged: {why}", reason="ADAPTER_MISMATCH", metadata={"tensor": name}
    )


def _incomplete(why: str, tensor: str) -> InvalidArgument:
    return InvalidArgument(
        f"{why}; train again or take another adapter", reason="ADAPTER_INCOMPLETE", metadata={"tensor": tensor}
    )
