"""A model that sees: both ways to its gradients agree, with every part of it frozen, adapted, or trained whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.finetune import packing
from services.finetune.config import RunConfig, override
from services.finetune.store import Store
from services.finetune.train import ops_torch
from services.finetune.train.engine import Autograd, Handmade
from services.finetune.train.images import Images, Look
from services.finetune.train.model import load_model, trainable
from services.finetune.vision import read_form
from tests.finetune.train.llava import blocks_with_images, tiny_llava

CPU = torch.device("cpu")
TOWER_LORA = {
    "lora.targets": ["all-linear", "model.vision_tower.*"],
    "lora.rank_pattern": {"model.vision_tower.*": 2},
    "lora.alpha_pattern": {"model.vision_tower.*": 3.0},
    "lora.modules_to_save": ["multi_modal_projector"],
}
PARTS: dict[str, dict[str, Any]] = {
    "pretraining: the projector alone": {"lora.targets": [], "lora.modules_to_save": ["multi_modal_projector"]},
    "the language model alone": {},
    "language model and projector": {"lora.modules_to_save": ["multi_modal_projector"]},
    "all three": TOWER_LORA,
    "the tower's own weights": {"lora.modules_to_save": ["vision_tower"]},
}


def config_of(**changes: Any) -> RunConfig:
    plain = {"method": "lora", "quant.bits": 0, "lora.rank": 4, "lora.alpha": 6, "lora.dropout": 0.0}
    return override(RunConfig(), {**plain, "model.dtype": "float32", **changes})


def loaded(folder: Path, **changes: Any) -> Any:
    """A model whose adapters do something from the start."""
    model = load_model(folder, config_of(**changes), torch.float32)
    for name, parameter in trainable(model).items():
        draw = torch.Generator().manual_seed(len(name))
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def gradients(engine: Any, model: Any, blocks: packing.Blocks, batches: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of a step, and every gradient that its optimizer would see."""
    model.train()
    for parameter in model.parameters():
        parameter.grad = None
    getattr(engine, "fused", None) and engine.fused.adapters.begin()
    loss = sum(float(engine.backprop(np.array(batch), 100, seed=n)) for n, batch in enumerate(batches))
    engine.combine(list(trainable(model).values()), 0.0)
    return loss, {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava") / "tiny")


def images_of(model: Any, folder: Path, store: Store, place: Path, **how: Any) -> Images:
    form = read_form(folder)
    assert form is not None
    return Images(model.get_base_model(), form, store, place, Look(CPU, torch.float32, **how))


def close(ours: Any, theirs: Any) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=5e-4, atol=5e-6, msg=name)


@pytest.mark.parametrize("parts", PARTS)
def test_by_hand_and_by_autograd_are_the_same(folder: Path, file_store: Store, tmp_path: Path, parts: str) -> None:
    blocks = blocks_with_images(file_store)
    batches = [[0, 1], [2, 3]]
    model = loaded(folder, **PARTS[parts])
    images = images_of(model, folder, file_store, tmp_path)
    theirs = gradients(Autograd(model, blocks, CPU, torch.float32, images=images), model, blocks, batches)
    moved = {name for name, g in theirs[1].items() if g.abs().max() > 0}
    # The tower's last layer is behind the one whose states are taken.
    assert all(name in moved or ".encoder.layers.3." in name or "post_layernorm" in name for name in theirs[1])
    engine = Handmade(model, blocks, CPU, config_of().model, 256, images=images, ops=ops_torch)
    close(gradients(engine, model, blocks, batches), theirs)
    assert float(engine.look(blocks, np.arange(4))) == pytest.approx(100 * theirs[0], rel=1e-5)
    images.close()


def test_the_loss_is_transformers_own(folder: Path, file_store: Store, tmp_path: Path) -> None:
    """Through LlavaForConditionalGeneration's forward on ids and pixels, row by row."""
    blocks = blocks_with_images(file_store, packed=False)
    model = loaded(folder)
    images = images_of(model, folder, file_store, tmp_path)
    ours = Autograd(model, blocks, CPU, torch.float32, images=images)
    for block in range(len(blocks)):
        keep = blocks.segments[block] > 0
        ids, labels = (torch.from_numpy(np.array(a[block][keep]))[None].long() for a in (blocks.ids, blocks.labels))
        pixels = images._pixels(images_digests(blocks, block)) if len(blocks.images_of(block)) else None
        with torch.no_grad():
            theirs = model.eval()(input_ids=ids, pixel_values=pixels, labels=labels).loss
        learned = int((labels >= 0).sum())
        assert float(ours.look(blocks, np.array([block]))) == pytest.approx(float(theirs) * learned, rel=1e-5)
    images.close()


def images_digests(blocks: packing.Blocks, block: int) -> list[str]:
    return [blocks.image_files[n] for n in blocks.images_of(block)]
