"""A tiny random Llama with a real byte-level tokenizer and ChatML template: small enough to train in seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer(directory: Path, specials: Sequence[str] = ()) -> Path:
    """Write tokenizer.json (bytes only, no merges: 256 + 3 entries, and `specials`), tokenizer_config.json and
    chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    directory.mkdir(parents=True, exist_ok=True)
    vocab = {token: n for n, token in enumerate(SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in [*SPECIALS, *specials]])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(CHATML)
    return directory


def tiny_sight(directory: Path, kind: str = "clip", side: int = 28, **processor: object) -> Path:
    """Write what is read of a vision-language model before its weights: the tokenizer with <image>, config.json and
    preprocessor_config.json. `kind` is clip, siglip or llava: CLIP's tower with images padded to squares. Patches have 14
    pixels a side."""
    from tokenizers import AddedToken, Tokenizer

    tiny_tokenizer(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    square = {"height": side, "width": side}
    tower = "siglip_vision_model" if kind == "siglip" else "clip_vision_model"
    config = {
        "model_type": "llava",
        "image_token_index": tokenizer.token_to_id("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "full" if kind == "siglip" else "default",
        "vision_config": {"model_type": tower, "image_size": side, "patch_size": 14},
    }
    form = {"image_processor_type": {"clip": "CLIP", "siglip": "Siglip", "llava": "Llava"}[kind] + "ImageProcessor"}
    sizes = {"size": square} if kind == "siglip" else {"size": {"shortest_edge": side}, "crop_size": square}
    (directory / "config.json").write_text(json.dumps(config))
    text = json.dumps({**form, **sizes, "do_pad": kind == "llava", **processor})
    (directory / "preprocessor_config.json").write_text(text)
    return directory


def tiny_model(
    directory: Path, seed: int = 0, hidden_size: int = 32, specials: Sequence[str] = (), context_length: int = 512
) -> Path:
    """Write a whole model: hidden 32, 2 layers, 4 heads over 2 KV heads, 259 tokens and `specials`, random from `seed`.

    Answers of a 4-bit model need a hidden size of 64 or more on a CPU: bitsandbytes' kernels take whole blocks only.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_tokenizer(directory, specials)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259 + len(specials),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2]
    model.save_pretrained(directory)
    return directory
