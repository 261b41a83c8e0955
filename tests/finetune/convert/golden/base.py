"""The bases of the checkpoints in this folder, which the tests make anew."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import tiny_model, tiny_tokenizer


def lora_base(folder: Path) -> Path:
    """What the adapters were trained on."""
    return tiny_model(folder)


def full_base(folder: Path) -> Path:
    """What was trained in full: small enough that its checkpoint is a few kilobytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tiny_tokenizer(folder))
    return folder
