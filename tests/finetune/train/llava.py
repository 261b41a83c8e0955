"""A tiny LLaVA of transformers' own classes, random from a seed: a CLIP tower of 4 layers, a projector, a Llama of 2."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from services.finetune import packing
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, publish
from services.finetune.templates import Encoded
from tests.tiny import tiny_tokenizer

IMAGE = 259
"""The id of an image token: the first after the tiny tokenizer's own."""
SIZE, PATCH = 16, 4
TOKENS = (SIZE // PATCH) ** 2


def tiny_config(text: type[Any] = LlamaConfig, hidden: int = 32, **changes: Any) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=16,
    )
    language = {
        "vocab_size": 320,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        **changes,
    }
    return LlavaConfig(
        vision_config=vision, text_config=text(**language), image_token_index=IMAGE, image_seq_length=TOKENS
    )


def tiny_llava(directory: Path, seed: int = 0, hidden: int = 32) -> Path:
    """Write a whole model with tokenizer and image processor."""
    tiny_tokenizer(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(tiny_config(hidden=hidden))
    model.generation_config.eos_token_id = [2]
    model.save_pretrained(directory)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": SIZE},
        "do_center_crop": True,
        "crop_size": {"height": SIZE, "width": SIZE},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


def picture(number: int) -> bytes:
    """A PNG of 20 x 24 pixels that no other number has."""
    levels = np.random.default_rng(number).integers(0, 256, (24, 20, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "PNG")
    return out.getvalue()


def rows_with_images(store: Store, count: int = 8) -> str:
    """A dataset's digest: rows about one image, about two, and about none."""
    files, rows = [], []
    for n in range(count):
        shown = [f"{n}.png", f"{(n + 1) % count}.png"][: (1, 1, 0, 2)[n % 4]]
        asked = "<image>\n" * len(shown) + f"say {n}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": f"{n} it is"}]
        rows.append({"id": str(n), "conversations": turns, **({"images": shown} if shown else {})})
        blob = store.put_blob(picture(n))
        files.append(File(f"{n}.png", blob.digest, blob.size))
    blob = store.put_blob("".join(json.dumps(row) + "\n" for row in rows).encode())
    files.append(File("a.jsonl", blob.digest, blob.size))
    return publish(store, Manifest("dataset", tuple(files), (), {"format": "llava", "rows": count}))


def blocks_with_images(store: Store, packed: bool = True, length: int = 96) -> packing.Blocks:
    """Rows with two images, one, one that others have too, and none, in blocks of which one has none."""
    draw = np.random.default_rng(0)
    rows = [(0, 1), (2,), (), (0,), (3,), (), (4,), (2,)]
    samples = []
    for row in rows:
        text = [draw.integers(3, 259, size).tolist() for size in (4, *[3] * len(row), 20)]
        ids = [i for n, part in enumerate(text) for i in ([IMAGE] * TOKENS if 0 < n <= len(row) else []) + part]
        samples.append(Encoded(ids, [n >= len(ids) - 16 for n in range(len(ids))]))
    made = packing.pack(samples, length, packed)
    files = tuple(store.put_blob(picture(n)).digest for n in range(5))
    numbers = np.array([n for row in rows for n in row], np.int32)
    offsets = packing.offsets_of(np.array([len(row) for row in rows]))
    return replace(made, flat=replace(made.flat, pictures=packing.Pictures(files, numbers, offsets)))
