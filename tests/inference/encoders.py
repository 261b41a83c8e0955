"""A tiny encoder in sentence-transformers' layout: BERT of random weights over a vocabulary of words and letters."""

from __future__ import annotations

import json
import string
from pathlib import Path

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "market", "fell"]
VOCABULARY = [*WORDS, *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase), ".", ","]


def tiny_encoder(directory: Path, mode: str = "mean", normalize: bool = True, max_length: int = 24) -> Path:
    """Write one; `mode` is mean, cls or max."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,  # so that vectors differ
    )
    BertModel(config).save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY))
    BertTokenizer(vocab=str(directory / "vocab.txt")).save_pretrained(directory)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": n, "name": str(n), "path": paths[n], "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": max_length}))
    names = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    pooling = {f"pooling_mode_{name}": key == mode for key, name in names.items()}
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return directory
