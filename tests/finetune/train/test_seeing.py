"""A model that sees: both ways to its gradients agree, with every part of it frozen, adapted, or trained whole."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

from services.finetune import packing, plan
from services.finetune.config import RunConfig, override
from services.finetune.devices import GIB, Device
from services.finetune.errors import InvalidArgument
from services.finetune.shape import read_shape
from services.finetune.store import Store
from services.finetune.towers import trained_of
from services.finetune.train import memory, ops_torch
from services.finetune.train.engine import Autograd, Handmade
from services.finetune.train.images import Images, Look
from services.finetune.train.model import load_model, trainable
from services.finetune.train.optim import group
from services.finetune.train.seeing import Seen, features, look_at
from services.finetune.vision import read_form
from services.finetune.weights import trained_parameters
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


def test_only_the_language_model_is_quantised_and_adapted_by_all_linear(folder: Path) -> None:
    model = load_model(folder, config_of(**{"method": "qlora", "quant.bits": 4}), torch.float32)
    causal = model.get_base_model()
    four = {n for n, m in causal.named_modules() if type(getattr(m, "base_layer", m)).__name__ == "Linear4bit"}
    assert len({n for n in four if "base_layer" not in n}) == 2 * 7
    assert all(n.startswith("model.language_model.layers.") for n in four)
    assert all(".language_model.layers." in name for name in trainable(model))
    assert len(trainable(model)) == 2 * 2 * 7


def test_parts_have_ranks_and_rates_of_their_own(folder: Path) -> None:
    rates = {"vision_tower": 1e-3, "*projector": 5e-3}
    chosen = config_of(**TOWER_LORA, **{"optim.lr": 1e-4, "optim.lr_pattern": rates, "lora.loraplus_lr_ratio": 4.0})
    model = load_model(folder, chosen, torch.float32)
    found = {id(p): g["peak_lr"] for g in group(chosen, model, trainable(model)) for p in g["params"]}
    for name, parameter in trainable(model).items():
        rate = 1e-3 if "vision_tower" in name else 5e-3 if "projector" in name else 1e-4
        assert found[id(parameter)] == pytest.approx(rate * (4 if ".lora_B." in name else 1)), name
        if ".lora_A." in name:
            assert parameter.shape[0] == (2 if "vision_tower" in name else 4), name
    unknown = override(chosen, {"optim.lr_pattern": {"vision_twoer": 1e-3}})
    with pytest.raises(InvalidArgument, match=r"optim.lr_pattern.*'vision_twoer'.*'vision_tower'"):
        group(unknown, model, trainable(model))
    with pytest.raises(InvalidArgument, match="nothing is left to train"):
        load_model(folder, config_of(**{"lora.targets": []}), torch.float32)


def test_trained_whole_it_could_be_written_back(folder: Path) -> None:
    changes = {"method": "full", "model.freeze": ["vision_tower", "model.language_model.layers.0"]}
    model = load_model(folder, config_of(**changes), torch.float32)
    names = set(trainable(model))
    assert any(n.startswith("model.multi_modal_projector") for n in names) and "lm_head.weight" in names
    assert not any("vision_tower" in n or "layers.0." in n for n in names)


def test_what_the_tower_gives_is_what_transformers_projects(folder: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        theirs = model.get_image_features(pixels, return_dict=True).pooler_output
        ours = model.model.multi_modal_projector(look_at(model, pixels))
    assert torch.equal(torch.stack(list(theirs)), ours)


@pytest.mark.parametrize("parts", PARTS)
def test_a_plan_counts_what_is_trained(folder: Path, parts: str) -> None:
    chosen = config_of(**PARTS[parts])
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    shape = read_shape(json.loads((folder / "config.json").read_text()), shapes)
    model = load_model(folder, chosen, torch.float32)
    assert trained_parameters(shape, chosen) == sum(p.numel() for p in trainable(model).values())
    assert shape.tower == memory.tower_of(model.get_base_model())
    assert trained_of(shape.tower, chosen) == memory.trained_beside(model.get_base_model())
    assert plan.engine(shape, chosen, Device("h100", 80 * GIB), "bfloat16") == "fused"
    batch = plan.Batch(1, 256, 100)
    with_images, without = (
        plan.memory(shape, chosen, b, 10, Device("cpu"), "float32").activations
        for b in (replace(batch, images=8), batch)
    )
    assert (with_images > without) == any("vision" in n or "projector" in n for n in trainable(model))


class Saved:
    """What autograd keeps, as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()  # else what a node saves of its own would hold it


def kept(model: Any, seen: Seen) -> list[int]:
    """Sizes of storages that autograd has for the features, once these are there: what comes after them in the tower is gone
    by then. Weights are left out."""
    alive = weakref.WeakSet[Saved]()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> Saved:
        alive.add(saved := Saved(tensor))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        found = features(model.get_base_model(), seen)
    assert found.requires_grad
    sizes = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in alive)}
    return [size for at, size in sizes.items() if at not in own]


def test_a_trained_tower_keeps_about_what_is_planned(folder: Path) -> None:
    """Storages that autograd saves, weights left out. A CPU's autocast and dropout keep other widths than a GPU's."""
    model = loaded(folder, **TOWER_LORA, **{"lora.dropout": 0.1}).bfloat16().train()
    causal, images = model.get_base_model(), 8
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    seen = Seen(torch.arange(16 * images), pixels_N3SS=torch.randn(images, 3, 16, 16))
    found = {}
    for kind in ("none", "full"):
        planned, told = memory.plan_tower(
            causal, images, 1 << 40, config_of(**{"model.gradient_checkpointing": kind}).model
        )
        assert ("once" if kind == "none" else "twice") in told
        with torch.autocast("cpu", torch.bfloat16):
            # The larger ones only: not copies of weights.
            found[kind] = planned, sum(size for size in kept(model, seen) if size > 16384)
    assert found["none"][1] == pytest.approx(found["none"][0], rel=0.35)
    assert found["full"][1] < found["none"][1] / 10 and found["full"][0] < found["none"][0] / 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_tower_trained_in_float32_keeps_what_is_planned(folder: Path, dropout: float) -> None:
    model = loaded(folder, **TOWER_LORA, **{"lora.dropout": dropout}).train()
    images, chosen = 8, config_of(**{"model.gradient_checkpointing": "none"}).model
    planned, _ = memory.plan_tower(model.get_base_model(), images, 1 << 40, chosen)
    seen = Seen(torch.arange(16 * images), pixels_N3SS=torch.randn(images, 3, 16, 16))
    assert sum(kept(model, seen)) == pytest.approx(planned, rel=0.1)
