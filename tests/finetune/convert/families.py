"""Tiny random checkpoints of the seed's families, as their authors laid them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.finetune.convert import originals

HIDDEN, HEADS, GROUPS, MLP, VOCAB, LAYERS, SIZE = 32, 4, 2, 48, 259, 2, 8
_SIZES = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
          "intermediate_size": MLP, "torch_dtype": "float32", "tie_word_embeddings": False,
          "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}  # fmt: skip
_LLAMA = {**_SIZES, "rms_norm_eps": 1e-6, "max_position_embeddings": 64, "hidden_act": "silu", "bos_token_id": 1,
          "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip


def _layers(form: dict[str, tuple[int, ...]], start: str) -> dict[str, tuple[int, ...]]:
    return {f"{start}{n}.{name}": shape for n in range(LAYERS) for name, shape in form.items()}


def _separate(
    kv: int, bias: bool = False, norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
) -> Any:
    sides = {"q": HIDDEN, "k": kv, "v": kv, "o": HIDDEN}
    form: dict[str, tuple[int, ...]] = {f"self_attn.{p}_proj.weight": (n, HIDDEN) for p, n in sides.items()}
    if bias:
        form |= {f"self_attn.{p}_proj.bias": (n,) for p, n in sides.items()}
    return {**form, **_MLP, **{f"{n}.weight": (HIDDEN,) for n in norms}}


_MLP = {
    "mlp.gate_proj.weight": (MLP, HIDDEN),
    "mlp.up_proj.weight": (MLP, HIDDEN),
    "mlp.down_proj.weight": (HIDDEN, MLP),
}
_ENDS = {
    "model.embed_tokens.weight": (VOCAB, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCAB, HIDDEN),
}
_FREQUENCIES = _layers({"self_attn.rotary_emb.inv_freq": (SIZE // 2,)}, "model.layers.")
_PACKED = _layers(
    {"self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN), "self_attn.o_proj.weight": (HIDDEN, HIDDEN), **_MLP,
     "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}, "model.layers.",
)  # fmt: skip
_KV = GROUPS * SIZE
_INTERNLM2 = {
    "attention.wqkv.weight": (HIDDEN + 2 * _KV, HIDDEN), "attention.wo.weight": (HIDDEN, HIDDEN),
    "attention.wqkv.bias": (HIDDEN + 2 * _KV,), "attention.wo.bias": (HIDDEN,),
    "feed_forward.w1.weight": (MLP, HIDDEN), "feed_forward.w3.weight": (MLP, HIDDEN),
    "feed_forward.w2.weight": (HIDDEN, MLP), "attention_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,),
}  # fmt: skip
_QWEN = {
    "attn.c_attn.weight": (3 * HIDDEN, HIDDEN), "attn.c_attn.bias": (3 * HIDDEN,), "attn.c_proj.weight": (HIDDEN, HIDDEN),
    "mlp.w1.weight": (MLP, HIDDEN), "mlp.w2.weight": (MLP, HIDDEN), "mlp.c_proj.weight": (HIDDEN, MLP),
    "ln_1.weight": (HIDDEN,), "ln_2.weight": (HIDDEN,),
}  # fmt: skip
_GLM = {
    "self_attention.query_key_value.weight": (HIDDEN + 2 * _KV, HIDDEN),
    "self_attention.query_key_value.bias": (HIDDEN + 2 * _KV,), "self_attention.dense.weight": (HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h.weight": (2 * MLP, HIDDEN), "mlp.dense_4h_to_h.weight": (HIDDEN, MLP),
    "input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,),
}  # fmt: skip

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "internlm": {**_layers(_separate(HIDDEN, bias=True), "model.layers."), **_ENDS, **_FREQUENCIES},
    "internlm2": {
        **_layers(_INTERNLM2, "model.layers."), "model.tok_embeddings.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,), "output.weight": (VOCAB, HIDDEN),
    },
    "internlm3": {**_layers(_separate(_KV), "model.layers."), **_ENDS},
    "baichuan": {**_PACKED, **_ENDS, **_FREQUENCIES},
    "baichuan2": {**_PACKED, **_ENDS},
    "yi": {**_layers(_separate(_KV, norms=("ln1", "ln2")), "model.layers."), **_ENDS},
    "qwen": {
        **_layers(_QWEN, "transformer.h."), "transformer.wte.weight": (VOCAB, HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN),
    },
    "chatglm": {
        **_layers(_GLM, "transformer.encoder.layers."), "transformer.rotary_pos_emb.inv_freq": (SIZE // 4,),
        "transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,), "transformer.output_layer.weight": (VOCAB, HIDDEN),
    },
}  # fmt: skip


def _llama(model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    return {**_LLAMA, "model_type": model_type, "architectures": [architecture], **more}


CONFIGS: dict[str, dict[str, Any]] = {
    "internlm": _llama("internlm", "InternLMForCausalLM", bias=True, rotary={"base": 10000, "type": "dynamic"}),
    "internlm2": _llama(
        "internlm2", "InternLM2ForCausalLM", bias=True, num_key_value_heads=GROUPS, rope_theta=1_000_000,
        rope_scaling={"type": "dynamic", "factor": 2.0}, attn_implementation="eager",
    ),
    "internlm3": _llama(
        "internlm3", "InternLM3ForCausalLM", bias=False, qkv_bias=False, num_key_value_heads=GROUPS, head_dim=SIZE,
        rope_theta=50_000_000, rope_scaling={"rope_type": "dynamic", "factor": 6.0},
    ),
    "baichuan": _llama("baichuan", "BaiChuanForCausalLM"),
    "baichuan2": _llama("baichuan", "BaichuanForCausalLM", model_max_length=64, z_loss_weight=0),
    "yi": _llama("Yi", "YiForCausalLM", num_key_value_heads=GROUPS, rope_theta=5_000_000.0),
    "qwen": {
        **_SIZES, "model_type": "qwen", "architectures": ["QWenLMHeadModel"], "intermediate_size": 2 * MLP,
        "kv_channels": SIZE, "layer_norm_epsilon": 1e-6, "no_bias": True, "rotary_emb_base": 10000, "rotary_pct": 1.0,
        "seq_length": 64, "max_position_embeddings": 128, "use_dynamic_ntk": True, "use_logn_attn": True,
        "scale_attn_weights": True, "use_flash_attn": "auto", "tokenizer_class": "QWenTokenizer",
    },
    "chatglm": {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "auto_map": {"AutoConfig": "evil.Evil"},
        "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True, "ffn_hidden_size": MLP,
        "fp32_residual_connection": False, "hidden_size": HIDDEN, "kv_channels": SIZE, "layernorm_epsilon": 1e-5,
        "multi_query_attention": True, "multi_query_group_num": GROUPS, "num_attention_heads": HEADS,
        "num_layers": LAYERS, "original_rope": True, "padded_vocab_size": VOCAB, "post_layer_norm": True,
        "rmsnorm": True, "seq_length": 64, "torch_dtype": "float32", "tie_word_embeddings": False, "eos_token_id": 2,
        "pad_token_id": 0,
    },
}  # fmt: skip

FORWARDS: dict[str, originals.Forward] = {
    "internlm": originals.internlm,
    "internlm2": originals.internlm2,
    "internlm3": originals.internlm3,
    "baichuan": originals.baichuan,
    "baichuan2": originals.baichuan,
    "yi": originals.yi,
    "qwen": originals.qwen,
    "chatglm": originals.chatglm,
}


def random_weights(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor of a family, with numbers large enough that a wrong order shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.randn(shape, generator=generator) * 0.4 for k, shape in SHAPES[name].items()}


def write_family(name: str, folder: Path, weights: dict[str, Tensor], pickled: bool = False) -> Path:
    """A checkpoint without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
