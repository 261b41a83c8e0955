"""`quartet publish`: what is refused, and what is written. tests/e2e/test_published.py runs it."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import grpc
import pytest
from quartet.conversion.v1 import conversion_pb2 as conversion
from quartet.conversion.v1 import conversion_pb2_grpc as conversion_grpc
from quartet.inference.v1 import inference_pb2 as inference
from quartet.inference.v1 import inference_pb2_grpc as inference_grpc

from services.client.commands.publish import publish
from services.client.parser import parser
from services.finetune.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

KIND = conversion.Model
AT = "workspaces/default"


class Registry(conversion_grpc.ConversionServicer):
    """Models of each kind."""

    def GetModel(self, request: conversion.GetModelRequest, context: Any) -> conversion.Model:
        name = request.name.rpartition("/")[2]
        kind = {"adapter": KIND.ADAPTER, "export": KIND.EXPORTED}.get(name, KIND.MERGED)
        base = f"{AT}/models/base" if name == "adapter" else ""
        return KIND(name=request.name, kind=kind, base_model=base, template="" if name == "mute" else "chatml")


class Served(inference_grpc.InferenceServicer):
    """An endpoint with one adapter."""

    def ListServedModels(self, request: Any, context: Any) -> inference.ListServedModelsResponse:
        models = [inference.ServedModel(endpoint=f"{AT}/endpoints/e", adapter=alias) for alias in ("", "v2")]
        return inference.ListServedModelsResponse(models=models)


@pytest.fixture()
def address(tmp_path: Path) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    conversion_grpc.add_ConversionServicer_to_server(Registry(), server)  # type: ignore[abstract]  # no other is called
    inference_grpc.add_InferenceServicer_to_server(Served(), server)  # type: ignore[abstract]  # no other is called
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    yield f"unix:{tmp_path}/s"
    server.stop(None).wait()


def run(address: str, *words: str) -> None:
    publish(parser().parse_args(["publish", "--endpoint", address, *words]))


@pytest.mark.parametrize(("target", "reason", "said"), [
    ("adapter", "MODEL_NOT_SERVABLE", "quartet convert merge base adapter NAME"),
    ("export", "MODEL_NOT_SERVABLE", "is an export"),
    ("mute", "TEMPLATE_MISSING", "no chat template"),
])  # fmt: skip
def test_what_cannot_chat_alone_is_refused(address: str, tmp_path: Path, target: str, reason: str, said: str) -> None:
    with pytest.raises(FailedPrecondition, match=said) as caught:
        run(address, target, str(tmp_path / "demo"))
    assert caught.value.reason == reason and not (tmp_path / "demo").exists()


def test_a_page_that_asks_names_what_is_served(address: str, tmp_path: Path) -> None:
    folder, url = tmp_path / "demo", "http://127.0.0.1:8000/v1"
    with pytest.raises(InvalidArgument, match="no http"):
        run(address, "e", str(folder), "--url", "127.0.0.1:8000")
    with pytest.raises(NotFound, match="e:v3 is not served"):
        run(address, "e:v3", str(folder), "--url", url)
    odd = 'A "demo" $here {x}'
    for _ in range(2):  # again over its own
        run(address, "e:v2", str(folder), "--url", url, "--title", odd, "--system", "be brief")
    assert {p.name for p in folder.iterdir()} == {"app.py", "demo.json", "requirements.txt", "README.md"}
    told = json.loads((folder / "demo.json").read_text())
    assert (told["model"], told["url"], told["title"], told["system"]) == ("e:v2", url, odd, "be brief")
    assert odd in (folder / "README.md").read_text() and odd not in (folder / "app.py").read_text()


def test_files_of_others_stay(address: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(AlreadyExists, match="other files"):
        run(address, "e", str(tmp_path), "--url", "http://127.0.0.1:8000/v1")


@pytest.mark.parametrize("kind", ["model", "url"])
def test_a_demo_imports_nothing_of_ours(kind: str) -> None:
    tree = ast.parse((resources.files("services.client") / f"demo/{kind}.py.in").read_text("utf-8"))
    named = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    named |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not [name for name in named if name.startswith(("services", "quartet"))]
