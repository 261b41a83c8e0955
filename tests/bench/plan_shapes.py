"""Bases that see, and rows with images, for plans beside what workers hold."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, publish, publish_directory
from tests.bench.jobs import GPU, META
from tests.bench.train_shapes import DEVICE, llama_config
from tests.tiny import tiny_tokenizer

SEEING: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "sees": (
        "small",
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        | {"image_size": 224, "patch_size": 16},
    ),
    "sees_small": (
        "135M",
        {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6}
        | {"image_size": 224, "patch_size": 14},
    ),
    "sees135M": (
        "135M",
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
        | {"image_size": 336, "patch_size": 14},
    ),
}
"""A shape of train_shapes.py and a CLIP tower: B/16's, one of DINOv2 ViT-S's size, a third of L/14's at 336 pixels."""
SEEING_LENGTH = 2048 if GPU else 768
"""Of blocks, where a case names none."""
IMAGE = 259
"""The first id after those of the tokenizer of bytes."""


def put_seeing(store: Store, shape: str) -> str:
    """As jobs.put_base."""
    text, vision = SEEING[shape]
    if found := store.get(f"bench/{shape}"):
        return found.data.decode()
    side, patches = sides(shape)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, projection_dim=64),
        text_config=llama_config(text),
        image_token_index=IMAGE,
        image_seq_length=patches,
    )
    torch.manual_seed(0)
    with DEVICE:
        model: Any = LlavaForConditionalGeneration(config)
    model = model.to(torch.bfloat16 if GPU else torch.float32)
    with tempfile.TemporaryDirectory() as home:
        folder = tiny_tokenizer(Path(home))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
        tokenizer.save(str(folder / "tokenizer.json"))
        CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
            folder
        )
        model.save_pretrained(folder)
        digest = publish_directory(
            store, "base", folder, meta={**META, "architecture": "LlavaForConditionalGeneration"}
        )
    store.put(f"bench/{shape}", digest.encode())
    return digest


def sides(shape: str) -> tuple[int, int]:
    """(pixels of an image's side, tokens of an image)."""
    _, vision = SEEING[shape]
    return vision["image_size"], (vision["image_size"] // vision["patch_size"]) ** 2


def put_images(store: Store, shape: str, count: int, length: int) -> str:
    """Rows of an image and text, each such as fills a block of `length`."""
    side, patches = sides(shape)
    files, lines = [], []
    for n in range(count):
        levels = np.random.default_rng(n).integers(0, 256, (side, side, 3), np.uint8)
        out = io.BytesIO()
        Image.fromarray(levels).save(out, "PNG")
        blob = store.put_blob(out.getvalue())
        files.append(File(f"{n}.png", blob.digest, blob.size))
        said = "y" * (length - patches - 64)
        turns = [{"from": "human", "value": f"<image>\nsay {n:8}"}, {"from": "gpt", "value": said}]
        lines.append(json.dumps({"id": str(n), "images": [f"{n}.png"], "conversations": turns}) + "\n")
    blob = store.put_blob("".join(lines).encode())
    files.append(File("a.jsonl", blob.digest, blob.size))
    return publish(store, Manifest("dataset", tuple(files), (), {"format": "llava", "rows": count}))
