"""A tiny model that sees, assembled as a user does it, adapters of it, and a server over it."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import peft
import torch
from PIL import Image
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from transformers import LlavaForConditionalGeneration

from services.common.server import Room
from services.finetune.convert import convert
from services.finetune.orders import ConvertRun
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import load, materialise
from services.finetune.tokenizer import Tokenizer
from services.finetune.vision import read_form
from services.inference.engines.adapters import Served
from services.inference.engines.port import Engine
from services.inference.engines.servicer import EngineServicer
from tests.common.serving import serve
from tests.finetune.convert import towers
from tests.inference import published
from tests.tiny import tiny_model

NAME = "workspaces/default/endpoints/e"
PARTS: dict[str, dict[str, Any]] = {
    "whole": {
        "target_modules": r"model\.(language_model|vision_tower)\..*(q_proj|v_proj)",
        "modules_to_save": ["multi_modal_projector"],
    },
    "language": {"target_modules": r"model\.language_model\..*(q_proj|v_proj)"},
}
"""Adapters by what they change."""


@dataclass(frozen=True)
class Seeing:
    """The model's folder and digest, and those of its adapters by name."""

    store: Store
    folder: Path
    digest: str
    adapters: dict[str, Path]


def tiny_seeing(home: Path) -> Seeing:
    store, count = open_store((home / "store").as_uri()), iter(range(99))

    def do(**task: Any) -> str:
        key, workdir = f"jobs/j{next(count)}", home / f"work{next(count)}"
        workdir.mkdir()
        raise_fence(store, key, 1)
        with Attempt(store, key, 1) as attempt:
            attempt.claim({"pid": 1})
            order = ConvertRun(job="workspaces/w/conversionJobs/j", **task)
            return convert(order, attempt, threading.Event(), workdir)["model"]

    # Wide enough for vLLM's kernels on a processor.
    language = tiny_model(home / "language", hidden_size=128)
    digest = towers.assembled(do, language, towers.clip(home / "tower"))
    folder = materialise(store, load(store, digest), home / "seeing")
    return Seeing(store, folder, digest, {name: _adapter(folder, home / name, name) for name in PARTS})


def _adapter(base: Path, folder: Path, name: str) -> Path:
    torch.manual_seed(7)
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", init_lora_weights=False, **PARTS[name])
    wrapped = peft.get_peft_model(model, config)
    for place, value in wrapped.named_parameters():
        if "modules_to_save" in place:
            value.data += 0.3 * torch.randn_like(value)
    wrapped.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    for file in published.TOKENIZER_FILES:
        (folder / file).write_bytes((base / file).read_bytes())
    return folder


@contextlib.contextmanager
def seeing_server(home: Path, seeing: Seeing, engine: Engine) -> Iterator[grpc.Channel]:
    """A channel to a server over an engine of `seeing`, with all of its adapters that the engine has been given."""
    base = load(seeing.store, seeing.digest)
    served = [Served("", "workspaces/default/models/seeing", seeing.digest, base)]
    tokenizer = Tokenizer.from_files(seeing.folder)
    servicer = EngineServicer(NAME, engine, tokenizer, served, seeing.store, read_form(seeing.folder))
    room = Room("quartet.inference.v1.Inference", lambda server: add_InferenceServicer_to_server(servicer, server))
    with serve(room, home) as channel:
        yield channel


def photo(seed: int, width: int = 60, height: int = 40, kind: str = "PNG") -> bytes:
    """An image file of noise."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(levels).save(data, kind)
    return data.getvalue()


def says(text: str) -> pb.Part:
    return pb.Part(text=text)


def shows(data: bytes) -> pb.Part:
    return pb.Part(image=pb.Image(data=data))


def user(*parts: pb.Part) -> pb.Message:
    return pb.Message(role=pb.Message.USER, content=parts)


def token_of(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["image_token_index"])
