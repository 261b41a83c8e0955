"""Tiny vision models as hubs have them, and a tiny LLaVA model assembled of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from services.finetune.orders import ArtifactRef, AssembleTask, ImportTask

SIDE, PATCH = 28, 14
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
IMAGES: dict[str, Any] = {"image_size": SIDE, "patch_size": PATCH}
SQUARE = {"height": SIDE, "width": SIDE}
CLIP_IMAGES: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "do_center_crop": True,
    "crop_size": SQUARE,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_convert_rgb": True,
    "resample": 3,
}


def clip(folder: Path, seed: int = 0) -> Path:
    """A CLIPVisionModel under the names of transformers 5."""
    torch.manual_seed(seed)
    return _save(CLIPVisionModel(CLIPVisionConfig(**SIZES, **IMAGES)), folder, CLIP_IMAGES)


def whole_clip(folder: Path) -> Path:
    """CLIPModel, both halves, under the names that hubs have, positions among them."""
    torch.manual_seed(0)
    text: dict[str, Any] = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, **IMAGES}, projection_dim=16))
    _save(model, folder, CLIP_IMAGES)
    positions = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    state = {k: v for k, v in model.state_dict().items() if k.startswith(("vision_", "text_", "visual_", "logit_"))}
    save_file({**state, **positions}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def siglip(folder: Path) -> Path:
    torch.manual_seed(0)
    images = {k: v for k, v in CLIP_IMAGES.items() if k != "crop_size"}
    images |= {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "do_center_crop": False}
    return _save(SiglipVisionModel(SiglipVisionConfig(**SIZES, **IMAGES)), folder, images)


def dinov2(folder: Path) -> Path:
    """Trained on images of another size than it is used with, as DINOv2 is; nothing in it is 0 or 1."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=PATCH))
    for value in model.parameters():
        torch.nn.init.normal_(value, mean=0.3 if value.ndim == 1 else 0.0, std=0.2)
    return _save(model, folder, {**CLIP_IMAGES, "image_processor_type": "BitImageProcessor"})


def _save(model: Any, folder: Path, images: dict[str, Any]) -> Path:
    model.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def ref(digest: str, name: str = "workspaces/w/models/m") -> ArtifactRef:
    return ArtifactRef(name=name, digest=digest)


def assembled(do: Any, language: Path, tower: Path, **options: Any) -> str:
    """The digest of a LLaVA model of these two folders, made as a user does."""
    made = [ref(do(import_model=ImportTask(local_path=str(folder)))) for folder in (language, tower)]
    return str(do(assemble=AssembleTask(language_model=made[0], vision_tower=made[1], **options)))
