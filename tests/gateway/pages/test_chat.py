"""A page that is left frees the engine; real HTTP and gRPC, a scripted engine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1 import inference_pb2_grpc as rpc

from services.common.server import KEEPALIVE


class Engine(rpc.InferenceServicer):
    """Says one word, then waits to be left."""

    def __init__(self) -> None:
        self.asked: list[pb.ChatRequest] = []
        self.ended = threading.Event()

    def Chat(self, request: pb.ChatRequest, context: Any) -> Iterator[pb.ChatResponse]:
        self.asked.append(request)
        gone = threading.Event()
        context.add_callback(gone.set)
        context.add_callback(self.ended.set)
        yield pb.ChatResponse(text="one", token_ids=[1])
        gone.wait(120)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, int]]:
    """The engine, and the port of the pages in front of it."""
    folder: Path = tmp_path_factory.mktemp("s")
    scripted = Engine()  # type: ignore[abstract]  # the page calls no other rpc here
    server = grpc.server(ThreadPoolExecutor(4), options=KEEPALIVE)
    rpc.add_InferenceServicer_to_server(scripted, server)
    server.add_insecure_port(f"unix:{folder}/s")
    server.start()
    # A process of its own: Gradio leaves an event loop open, which this one would be blamed for.
    command = [sys.executable, "-m", "services.gateway", "--port", "0", "--endpoint", f"unix:{folder}/s"]
    with subprocess.Popen([*command, "--address-file", str(folder / "address")]) as process:
        deadline = time.monotonic() + 120
        while not (folder / "address").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        yield scripted, int((folder / "address").read_text().rpartition(":")[2])
        process.terminate()
        assert process.wait(60) == 0
    server.stop(None).wait()


def test_who_leaves_frees_the_engine(page: tuple[Engine, int]) -> None:
    engine, port = page
    join = {
        "data": [{"text": "hi", "files": []}, None, "e", "", "", "", "", "", "", ""],
        "session_hash": "s",
        "fn_index": fn_index(port),
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/gradio_api/queue/join",
        json.dumps(join).encode(),
        {"content-type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=60).close()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as wire:
        wire.sendall(b"GET /gradio_api/queue/data?session_hash=s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        seen = b""
        while b"one" not in seen:
            piece = wire.recv(65536)
            assert piece, seen
            seen += piece
        assert not engine.ended.is_set()
    assert engine.ended.wait(60)
    assert engine.asked[0].endpoint == "workspaces/default/endpoints/e"


def fn_index(port: int) -> int:
    """Of the chat's answer, as the page finds it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/config", timeout=60) as answer:
        config = json.load(answer)
    return next(int(d["id"]) for d in config["dependencies"] if d["api_name"] == "chat")
