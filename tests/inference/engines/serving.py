"""An engine server in this process, over a tiny model with a template of one's choice."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from quartet.inference.v1.inference_pb2_grpc import add_InferenceServicer_to_server

from services.common.server import Room
from services.finetune.store import open_store
from services.finetune.store.artifacts import load
from services.finetune.tokenizer import Tokenizer
from services.inference.engines.adapters import Served
from services.inference.engines.port import Engine
from services.inference.engines.servicer import EngineServicer
from services.inference.engines.transformers import TransformersEngine
from tests.common.serving import serve
from tests.inference import published
from tests.inference.engines import call_templates
from tests.tiny import tiny_model

NAME = "workspaces/default/endpoints/e"


@contextlib.contextmanager
def engine_server(home: Path, template: str, /, engine: Engine | None = None, **changes: Any) -> Iterator[grpc.Channel]:
    """A channel to it. `template` is one of call_templates, "" for plain ChatML; `engine` stands for the model's own;
    `changes` are of the artifact's meta."""
    folder = tiny_model(home / "model", specials=call_templates.SPECIALS.get(template, ()), context_length=2048)
    if template:
        (folder / "chat_template.jinja").write_text(call_templates.jinja(template))
    store = open_store((home / "store").as_uri())
    digest = published.model(store, folder, "tiny", **changes)
    served = [Served("", "workspaces/default/models/tiny", digest, load(store, digest))]
    engine = engine or TransformersEngine(folder, {}, "float32", 0)
    servicer = EngineServicer(NAME, engine, Tokenizer.from_files(folder), served, store)
    room = Room("quartet.inference.v1.Inference", lambda server: add_InferenceServicer_to_server(servicer, server))
    with serve(room, home) as channel:
        yield channel
