"""The seed's families as their authors defined them: forward passes in plain torch over the original tensor names.

Written from the published definitions, and from nothing of ours:

    internlm      modeling_internlm.py   internlm/internlm-7b          (InternLMAttention, InternLMMLP)
    internlm2     modeling_internlm2.py  internlm/internlm2-chat-7b    (wqkv by "b q (h gs d)")
    internlm3     modeling_internlm3.py  internlm/internlm3-8b-instruct
    baichuan      modeling_baichuan.py   baichuan-inc/Baichuan-7B, Baichuan2-7B-Base (NormHead)
    yi            modeling_yi.py         01-ai/Yi-6B, first release    (ln1, ln2)
    qwen          modeling_qwen.py       Qwen/Qwen-7B                  (c_attn; a1 * silu(a2))
    chatglm       modeling_chatglm.py    THUDM/chatglm2-6b, chatglm3-6b (rotation of neighbours, half a head)

Each takes {name: tensor}, the original config and token ids, and gives logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]
Config = Mapping[str, Any]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def angles(length: int, size: int, base: float) -> Tensor:
    inverse = 1.0 / (base ** (torch.arange(0, size, 2).float() / size))
    return torch.outer(torch.arange(length).float(), inverse)


def dynamic_base(base: float, size: int, length: int, longest: int, factor: float) -> float:
    """Dynamic NTK, as InternLM…DynamicNTKScalingRotaryEmbedding._set_cos_sin_cache has it."""
    if length <= longest:
        return base
    return float(base * ((factor * length / longest) - (factor - 1)) ** (size / (size - 2)))


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """x: [length, heads, size]; the first half of a head turns with the second."""
    both = torch.cat((angle, angle), -1)[:, None]
    left, right = x.chunk(2, -1)
    return x * both.cos() + torch.cat((-right, left), -1) * both.sin()


def rotate_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """The first half of a head only, each number with its neighbour (ChatGLM's apply_rotary_pos_emb)."""
    turned, kept = x.chunk(2, -1)
    pairs = turned.unflatten(-1, (-1, 2))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.cat((torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2), kept), -1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[length, heads, size] each; k and v may have fewer heads, each for a run of queries."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    mixed: Tensor = torch.einsum("hqk,khd->qhd", weights, v)
    return mixed.flatten(1)


def heads(x: Tensor, size: int) -> Tensor:
    found: Tensor = x.unflatten(-1, (-1, size))
    return found


def internlm(w: Weights, c: Config, ids: Tensor) -> Tensor:
    size = c["hidden_size"] // c["num_attention_heads"]
    rotary = c["rotary"]
    base = rotary["base"]
    if rotary["type"] == "dynamic":
        base = dynamic_base(base, size, len(ids), c["max_position_embeddings"], rotary.get("scaling_factor", 1.0))
    return _llama_shaped(w, c, ids, angles(len(ids), size, base), size)


def _llama_shaped(w: Weights, c: Config, ids: Tensor, angle: Tensor, size: int) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for n in range(c["num_hidden_layers"]):
        at = f"model.layers.{n}."
        h = rms(x, w[at + "input_layernorm.weight"], c["rms_norm_eps"])
        q, k, v = (heads(linear(w, f"{at}self_attn.{p}_proj", h), size) for p in "qkv")
        x = x + linear(w, at + "self_attn.o_proj", attend(rotate_halves(q, angle), rotate_halves(k, angle), v))
        h = rms(x, w[at + "post_attention_layernorm.weight"], c["rms_norm_eps"])
        gate, up = linear(w, at + "mlp.gate_proj", h), linear(w, at + "mlp.up_proj", h)
        x = x + linear(w, at + "mlp.down_proj", F.silu(gate) * up)
    return linear(w, "lm_head", rms(x, w["model.norm.weight"], c["rms_norm_eps"]))


def internlm3(w: Weights, c: Config, ids: Tensor) -> Tensor:
    size, scaling = c["head_dim"], c["rope_scaling"]
    base = dynamic_base(c["rope_theta"], size, len(ids), c["max_position_embeddings"], scaling["factor"])
    return _llama_shaped(w, c, ids, angles(len(ids), size, base), size)


def internlm2(w: Weights, c: Config, ids: Tensor) -> Tensor:
    size = c["hidden_size"] // c["num_attention_heads"]
    queries = c["num_attention_heads"] // c["num_key_value_heads"]
    factor = c["rope_scaling"]["factor"]
    base = dynamic_base(c["rope_theta"], size, len(ids), c["max_position_embeddings"], factor)
    angle, eps = angles(len(ids), size, base), c["rms_norm_eps"]
    x = w["model.tok_embeddings.weight"][ids]
    for n in range(c["num_hidden_layers"]):
        at = f"model.layers.{n}."
        fused = linear(w, at + "attention.wqkv", rms(x, w[at + "attention_norm.weight"], eps))
        fused = fused.unflatten(-1, (-1, queries + 2, size))
        q, k, v = fused[:, :, :queries].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
        x = x + linear(w, at + "attention.wo", attend(rotate_halves(q, angle), rotate_halves(k, angle), v))
        h = rms(x, w[at + "ffn_norm.weight"], eps)
        gated = F.silu(linear(w, at + "feed_forward.w1", h)) * linear(w, at + "feed_forward.w3", h)
        x = x + linear(w, at + "feed_forward.w2", gated)
    return linear(w, "output", rms(x, w["model.norm.weight"], eps))


def baichuan(w: Weights, c: Config, ids: Tensor) -> Tensor:
    size, eps = c["hidden_size"] // c["num_attention_heads"], c["rms_norm_eps"]
    angle = angles(len(ids), size, 10000)
    x = w["model.embed_tokens.weight"][ids]
    for n in range(c["num_hidden_layers"]):
        at = f"model.layers.{n}."
        packed = linear(w, at + "self_attn.W_pack", rms(x, w[at + "input_layernorm.weight"], eps))
        q, k, v = (heads(part, size) for part in packed.unflatten(-1, (3, c["hidden_size"])).unbind(-2))
        x = x + linear(w, at + "self_attn.o_proj", attend(rotate_halves(q, angle), rotate_halves(k, angle), v))
        h = rms(x, w[at + "post_attention_layernorm.weight"], eps)
        gate, up = linear(w, at + "mlp.gate_proj", h), linear(w, at + "mlp.up_proj", h)
        x = x + linear(w, at + "mlp.down_proj", F.silu(gate) * up)
    x = rms(x, w["model.norm.weight"], eps)
    head = w["lm_head.weight"]
    if c["architectures"] == ["BaichuanForCausalLM"]:  # Baichuan2's NormHead
        head = head / head.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return F.linear(x, head)


def yi(w: Weights, c: Config, ids: Tensor) -> Tensor:
    names = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    size = c["hidden_size"] // c["num_attention_heads"]
    renamed = {".".join(names.get(part, part) for part in k.split(".")): v for k, v in w.items()}
    return _llama_shaped(renamed, c, ids, angles(len(ids), size, c["rope_theta"]), size)


def qwen(w: Weights, c: Config, ids: Tensor) -> Tensor:
    size, eps = c["kv_channels"], c["layer_norm_epsilon"]
    angle = angles(len(ids), size, c["rotary_emb_base"])
    assert len(ids) <= c["seq_length"], "beyond it the original scales by log n and turns otherwise"
    x = w["transformer.wte.weight"][ids]
    for n in range(c["num_hidden_layers"]):
        at = f"transformer.h.{n}."
        mixed = linear(w, at + "attn.c_attn", rms(x, w[at + "ln_1.weight"], eps))
        q, k, v = (heads(part, size) for part in mixed.split(c["hidden_size"], -1))
        x = x + linear(w, at + "attn.c_proj", attend(rotate_halves(q, angle), rotate_halves(k, angle), v))
        h = rms(x, w[at + "ln_2.weight"], eps)
        x = x + linear(w, at + "mlp.c_proj", linear(w, at + "mlp.w1", h) * F.silu(linear(w, at + "mlp.w2", h)))
    return linear(w, "lm_head", rms(x, w["transformer.ln_f.weight"], eps))


def chatglm(w: Weights, c: Config, ids: Tensor) -> Tensor:
    size, eps, groups = c["kv_channels"], c["layernorm_epsilon"], c["multi_query_group_num"]
    angle = angles(len(ids), size // 2, 10000)
    x = w["transformer.embedding.word_embeddings.weight"][ids]
    for n in range(c["num_layers"]):
        at = f"transformer.encoder.layers.{n}."
        mixed = linear(w, at + "self_attention.query_key_value", rms(x, w[at + "input_layernorm.weight"], eps))
        parts = mixed.split([c["num_attention_heads"] * size, groups * size, groups * size], -1)
        q, k, v = (heads(part, size) for part in parts)
        seen = attend(rotate_neighbours(q, angle), rotate_neighbours(k, angle), v)
        x = x + linear(w, at + "self_attention.dense", seen)
        h = rms(x, w[at + "post_attention_layernorm.weight"], eps)
        first, second = linear(w, at + "mlp.dense_h_to_4h", h).chunk(2, -1)
        x = x + linear(w, at + "mlp.dense_4h_to_h", F.silu(first) * second)
    return linear(w, "transformer.output_layer", rms(x, w["transformer.encoder.final_layernorm.weight"], eps))


Forward = Callable[[Weights, Config, Tensor], Tensor]
