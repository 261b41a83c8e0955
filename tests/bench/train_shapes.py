"""Models of random weights and documents of random tokens, in sizes that people train."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch

from services.finetune.config import RunConfig, override
from services.finetune.packing import Blocks, pack
from services.finetune.shape import Shape, read_shape
from services.finetune.templates import Encoded

SHAPES: dict[str, dict[str, Any]] = {
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "70B5": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 5, "num_attention_heads": 64},
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1.8B": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24, "num_attention_heads": 16},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8},
}
VOCABULARY = {"70B": 32000, "70B5": 32000, "7B": 32000, "1.8B": 151936, "135M": 49152, "small": 4096}
KV_HEADS = {"70B": 8, "70B5": 8, "135M": 3}
"""Where fewer than the heads. 7B and 70B are Llama 2's shapes, 70B5 is five layers of it, 1.8B Qwen's, 135M SmolLM2's."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def llama_config(shape: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY[shape],
        num_key_value_heads=KV_HEADS.get(shape, SHAPES[shape]["num_attention_heads"]),
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def shape_of(shape: str) -> Shape:
    """As a plan sees it. No weights are made."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(shape))
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    return read_shape(config, {name: list(p.shape) for name, p in model.named_parameters()})


def random_causal(shape: str, dtype: torch.dtype, quantised: bool = False) -> Any:
    """A Llama of `shape` weights drawn as transformers does, NF4 with nested scales if `quantised`."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(llama_config(shape), dtype=dtype, attn_implementation="sdpa")
    if quantised:
        for layer in model.model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name, linear in [(n, m) for n, m in block.named_children() if type(m) is torch.nn.Linear]:
                    setattr(block, name, _quantised(linear))
        model.is_loaded_in_4bit = True
    return model


def _quantised(linear: Any) -> Any:
    from bitsandbytes.nn.modules import Linear4bit

    inputs, outputs = linear.in_features, linear.out_features
    made = Linear4bit(
        inputs, outputs, bias=False, compute_dtype=linear.weight.dtype, quant_type="nf4", device=torch.device("meta")
    )
    made.weight = nf4(linear.weight.data)
    return made


def nf4(values: torch.Tensor, nested: bool = True) -> Any:
    """A 4 bit weight of bitsandbytes."""
    from bitsandbytes.nn import modules

    fresh: Any = modules.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=nested)
    return fresh.to(DEVICE)


def twin(model: Any) -> Any:
    """The same weights in modules of their own: two trainers can work on one base."""
    shared = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, shared)


def documents(count: int, vocabulary: int, longest: int = 2048, median: int = 365, seed: int = 0) -> list[list[int]]:
    """Log-normal lengths, uniform tokens."""
    draw = np.random.default_rng(seed)
    lengths = np.clip(draw.lognormal(np.log(median), 0.8, count).astype(int), 16, longest)
    return [draw.integers(3, vocabulary, n).tolist() for n in lengths]


def blocks_of(docs: list[list[int]], length: int = 2048) -> Blocks:
    return pack([Encoded(d, [True] * len(d)) for d in docs], length, True)


def run_config(quantised: bool, batch_size: int, dropout: float = 0.1, rank: int = 64) -> RunConfig:
    """Rank 64 on all linear layers, alpha 16: the peer's settings too."""
    return override(
        RunConfig(),
        {
            "method": "qlora" if quantised else "lora",
            "quant.bits": 4 if quantised else 0,
            "model.dtype": "bfloat16",
            "lora.rank": rank,
            "lora.dropout": dropout,
            "optim.name": "adamw",
            "schedule.batch_size": batch_size,
            "schedule.accumulate": 1,
            "schedule.max_steps": 10_000,
        },
    )


def matmul_parameters(shape: str) -> int:
    """Weights of linear layers and head: LoRA costs 4 FLOP a token for each."""
    s = SHAPES[shape]
    d, f = s["hidden_size"], s["intermediate_size"]
    kv = d * KV_HEADS.get(shape, s["num_attention_heads"]) // s["num_attention_heads"]
    count: int = s["num_hidden_layers"] * (2 * d * d + 2 * d * kv + 3 * d * f) + d * VOCABULARY[shape]
    return count
