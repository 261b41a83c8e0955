"""Model families that came with code of their own, as tables: the native architecture that computes exactly the same.

    family                model_type          becomes   what differs
    InternLM              internlm            Llama     biases on q, k, v, o
    InternLM2, 2.5        internlm2           Llama     wqkv holds each group's queries, key and value; w1 w3 w2; other names
    InternLM3             internlm3           Llama     nothing but the name
    Baichuan-7B           baichuan            Llama     W_pack is q, k, v
    Baichuan2-7B          baichuan            Llama     the same, and a head whose rows have length one
    Yi (first release)    Yi                  Llama     names of the norms
    Qwen 1                qwen                Qwen2     c_attn is q, k, v; w2 is the gate, w1 the up projection
    ChatGLM2, ChatGLM3    chatglm             GLM       query_key_value is q, k, v; other names

Baichuan-13B and Baichuan2-13B tell positions by ALiBi; no architecture of transformers has ALiBi together with RMSNorm and
a gated SiLU, so they are refused. Only a config's data is read: its auto_map names code that is never fetched nor run.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from services.finetune.errors import FailedPrecondition

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads of queries, of keys and values, and numbers in one head."""

    query: int
    groups: int
    size: int


Rows = Callable[[Any, Heads], Any]
"""Picks rows of a fused module's output: of a weight, a bias, or a LoRA's B."""


@dataclass(frozen=True, slots=True)
class Part:
    """A native module, and which rows of the original it has; None is all of them."""

    module: str
    rows: Rows | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """How one family becomes native. `{n}` in a module's name stands for the layer."""

    name: str
    template: str
    native: Callable[[Config], Config]
    modules: Mapping[str, tuple[Part, ...]]
    unit_head: bool = False
    """The rows of the output head are brought to length one before they are used."""


def _run(part: int) -> Rows:
    """Queries, keys and values one after the other."""

    def rows(value: Any, heads: Heads) -> Any:
        sizes = [heads.query * heads.size, heads.groups * heads.size, heads.groups * heads.size]
        return value.split(sizes)[part]

    return rows


def _group(first: int, last: int) -> Rows:
    """Each group of queries followed by its key and its value."""

    def rows(value: Any, heads: Heads) -> Any:
        grouped = value.reshape(heads.groups, heads.query // heads.groups + 2, heads.size, *value.shape[1:])
        return grouped[:, first : last or None].reshape(-1, *value.shape[1:])

    return rows


def _qkv(rows: tuple[Rows, Rows, Rows]) -> tuple[Part, ...]:
    names = ("q_proj", "k_proj", "v_proj")
    return tuple(Part(f"model.layers.{{n}}.self_attn.{n}", r) for n, r in zip(names, rows, strict=True))


def _one(module: str) -> tuple[Part, ...]:
    return (Part(module),)


_LAYER = "model.layers.{n}."
_IN_RUNS = _qkv((_run(0), _run(1), _run(2)))

# ---------------------------------------------------------------------------------------------- configs


def _common(config: Config, native: Config, **names: str) -> Config:
    """A native config: `native` as it stands, and the original's values; `names` gives their original keys."""
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_theta", "hidden_act",
            "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype",
            "dtype", "quantization_config")  # fmt: skip
    found = {k: config[names.get(k, k)] for k in kept if config.get(names.get(k, k)) is not None}
    return {"tie_word_embeddings": False, **found, **native}


def _llama(config: Config, **native: Any) -> Config:
    return _common(config, {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **native})


def _internlm(config: Config) -> Config:
    rotary = config.get("rotary") or {}
    scaling = {"rope_type": "dynamic", "factor": float(rotary.get("scaling_factor", 1.0))}
    return _llama(
        config,
        attention_bias=bool(config.get("bias", True)),
        rope_theta=float(rotary.get("base", 10000)),
        **({"rope_scaling": scaling} if rotary.get("type") == "dynamic" else {}),
    )


def _internlm23(config: Config) -> Config:
    bias = bool(config.get("bias"))
    _demand(config, qkv_bias=bias)
    head = {"head_dim": config["head_dim"]} if config.get("head_dim") else {}
    return _llama(config, attention_bias=bias, mlp_bias=bias and "qkv_bias" in config, **_scaling(config), **head)


def _scaling(config: Config) -> Config:
    given = config.get("rope_scaling")
    if not given:
        return {}
    kind = given.get("rope_type") or given.get("type")
    if kind not in ("dynamic", "linear"):
        raise _unsupported(f"rope_scaling of type {kind!r} is not known for this family")
    return {"rope_scaling": {"rope_type": kind, "factor": float(given["factor"])}}


def _baichuan(config: Config) -> Config:
    if "max_position_embeddings" not in config:
        raise _unsupported(
            "Baichuan's 13B models tell positions by ALiBi, and no architecture of transformers joins that with RMSNorm "
            "and a gated SiLU; a Llama made of them would answer, and wrongly"
        )
    return _llama(config, attention_bias=False, rope_theta=10000.0)


def _yi(config: Config) -> Config:
    return _llama(config, attention_bias=False, rope_theta=float(config.get("rope_theta", 5_000_000)))


def _qwen(config: Config) -> Config:
    _demand(config, no_bias=True, rotary_pct=1.0, scale_attn_weights=True)
    _demand(config, kv_channels=config["hidden_size"] // config["num_attention_heads"])
    native = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "intermediate_size": config["intermediate_size"] // 2,
        "num_key_value_heads": config["num_attention_heads"],
        # Past this length the original changes its rotation and scales its queries (dynamic NTK, log-n); up to it
        # neither does anything, so that is the length at which the two are equal.
        "max_position_embeddings": config.get("seq_length", 8192),
        "use_sliding_window": False,
        "hidden_act": "silu",
    }
    return _common(config, native, rms_norm_eps="layer_norm_epsilon", rope_theta="rotary_emb_base")


def _chatglm(config: Config) -> Config:
    _demand(config, rmsnorm=True, post_layer_norm=True, apply_residual_connection_post_layernorm=False)
    _demand(config, add_bias_linear=False, original_rope=True, rope_ratio=1, pre_seq_len=None)
    grouped = bool(config.get("multi_query_attention"))
    native = {
        "model_type": "glm",
        "architectures": ["GlmForCausalLM"],
        "num_key_value_heads": config["multi_query_group_num" if grouped else "num_attention_heads"],
        "head_dim": config["kv_channels"],
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "attention_bias": bool(config.get("add_qkv_bias")),
        "hidden_act": "silu",
    }
    names = {"vocab_size": "padded_vocab_size", "intermediate_size": "ffn_hidden_size", "rms_norm_eps": "layernorm_epsilon",
             "num_hidden_layers": "num_layers", "max_position_embeddings": "seq_length"}  # fmt: skip
    return {"pad_token_id": 0, **_common(config, native, **names)}


def _demand(config: Config, **wanted: Any) -> None:
    """Settings that no published model of the family has otherwise, and that the native architecture cannot do."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise _unsupported(f"config.json says {key}: {config[key]!r}, and only {value!r} has a native equal")


def _unsupported(why: str) -> FailedPrecondition:
    return FailedPrecondition(why, reason="MODEL_UNSUPPORTED")


# ---------------------------------------------------------------------------------------------- families

_PACKED = {_LAYER + "self_attn.W_pack": _IN_RUNS}
_INTERNLM2 = {
    "model.tok_embeddings": _one("model.embed_tokens"),
    _LAYER + "attention.wqkv": _qkv((_group(0, -2), _group(-2, -1), _group(-1, 0))),
    _LAYER + "attention.wo": _one(_LAYER + "self_attn.o_proj"),
    _LAYER + "feed_forward.w1": _one(_LAYER + "mlp.gate_proj"),
    _LAYER + "feed_forward.w3": _one(_LAYER + "mlp.up_proj"),
    _LAYER + "feed_forward.w2": _one(_LAYER + "mlp.down_proj"),
    _LAYER + "attention_norm": _one(_LAYER + "input_layernorm"),
    _LAYER + "ffn_norm": _one(_LAYER + "post_attention_layernorm"),
    "output": _one("lm_head"),
}
_YI = {
    _LAYER + "ln1": _one(_LAYER + "input_layernorm"),
    _LAYER + "ln2": _one(_LAYER + "post_attention_layernorm"),
}
_QWEN = {
    "transformer.wte": _one("model.embed_tokens"),
    "transformer.h.{n}.attn.c_attn": _IN_RUNS,
    "transformer.h.{n}.attn.c_proj": _one(_LAYER + "self_attn.o_proj"),
    "transformer.h.{n}.mlp.w2": _one(_LAYER + "mlp.gate_proj"),
    "transformer.h.{n}.mlp.w1": _one(_LAYER + "mlp.up_proj"),
    "transformer.h.{n}.mlp.c_proj": _one(_LAYER + "mlp.down_proj"),
    "transformer.h.{n}.ln_1": _one(_LAYER + "input_layernorm"),
    "transformer.h.{n}.ln_2": _one(_LAYER + "post_attention_layernorm"),
    "transformer.ln_f": _one("model.norm"),
}
_GLM_LAYER = "transformer.encoder.layers.{n}."
_CHATGLM = {
    "transformer.embedding.word_embeddings": _one("model.embed_tokens"),
    _GLM_LAYER + "self_attention.query_key_value": _IN_RUNS,
    _GLM_LAYER + "self_attention.dense": _one(_LAYER + "self_attn.o_proj"),
    _GLM_LAYER + "mlp.dense_h_to_4h": _one(_LAYER + "mlp.gate_up_proj"),
    _GLM_LAYER + "mlp.dense_4h_to_h": _one(_LAYER + "mlp.down_proj"),
    _GLM_LAYER + "input_layernorm": _one(_LAYER + "input_layernorm"),
    _GLM_LAYER + "post_attention_layernorm": _one(_LAYER + "post_attention_layernorm"),
    "transformer.encoder.final_layernorm": _one("model.norm"),
    "transformer.output_layer": _one("lm_head"),
}

FAMILIES = {
    "InternLMForCausalLM": Family("internlm", "internlm_chat", _internlm, {}),
    "InternLM2ForCausalLM": Family("internlm2", "internlm2_chat", _internlm23, _INTERNLM2),
    "InternLM3ForCausalLM": Family("internlm3", "internlm2_chat", _internlm23, {}),
    "BaiChuanForCausalLM": Family("baichuan", "baichuan_chat", _baichuan, _PACKED),
    "BaichuanForCausalLM": Family("baichuan2", "baichuan2_chat", _baichuan, _PACKED, unit_head=True),
    "YiForCausalLM": Family("yi", "", _yi, _YI),
    "QWenLMHeadModel": Family("qwen", "qwen_chat", _qwen, _QWEN),
    "ChatGLMModel": Family("chatglm", "chatglm2", _chatglm, _CHATGLM),
    "ChatGLMForConditionalGeneration": Family("chatglm", "chatglm2", _chatglm, _CHATGLM),
}
"""By the class that a config names in `architectures`."""
_MODEL_TYPES = {"internlm", "internlm2", "internlm3", "baichuan", "Yi", "qwen", "chatglm"}
_LIMITS = {"num_hidden_layers": 1000, "hidden_size": 1 << 20, "intermediate_size": 1 << 22, "vocab_size": 1 << 24,
           "num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 1 << 16}  # fmt: skip
"""Far above any model: a config of a billion layers must not be built."""
_DERIVED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")


def family_of(config: Config) -> Family | None:
    """The family of a config, by the names in it; None if it is none of these."""
    if config.get("model_type") not in _MODEL_TYPES:
        return None
    return FAMILIES.get(str((config.get("architectures") or [""])[0]))


def native_config(family: Family, config: Config) -> Config:
    """The native config. FailedPrecondition (MODEL_UNSUPPORTED) for a setting that has no native equal."""
    try:
        native = family.native(config)
        for key, limit in _LIMITS.items():
            if type(native.get(key, 1)) is not int or not 0 < native.get(key, 1) <= limit:
                raise ValueError(f"{key} is {native[key]!r}")
        if native["hidden_size"] % native["num_attention_heads"]:
            raise ValueError("hidden_size is no multiple of num_attention_heads")
        return native
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        raise _unsupported(
            f"config.json lacks what a model of {family.name} has, or has it wrongly: {error}"
        ) from error


def heads_of(config: Config) -> Heads:
    """The heads of a native config."""
    query = int(config["num_attention_heads"])
    size = config.get("head_dim") or config["hidden_size"] // query
    return Heads(query, int(config.get("num_key_value_heads") or query), int(size))


def native_parts(family: Family, module: str) -> tuple[Part, ...]:
    """The native modules that an original one becomes, named in full; itself if the family does not rename it."""
    for pattern, parts in _patterns(family.name):
        if match := pattern.fullmatch(module):
            layer = match[1] if match.lastindex else ""
            return tuple(Part(p.module.replace("{n}", layer), p.rows) for p in parts)
    return (Part(module),)


def is_derived(tensor: str) -> bool:
    """Whether a tensor is not learned but computed anew by the native model."""
    return tensor.endswith(_DERIVED)


@functools.cache
def _patterns(name: str) -> list[tuple[re.Pattern[str], tuple[Part, ...]]]:
    family = next(f for f in FAMILIES.values() if f.name == name)
    return [(re.compile(re.escape(k).replace(r"\{n\}", r"(\d+)")), parts) for k, parts in family.modules.items()]
