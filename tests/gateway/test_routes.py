"""The routes against a scripted engine over real HTTP and gRPC: hanging up, and an engine that dies in the middle."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
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
from tests.gateway.web import gateway


class Engine(rpc.InferenceServicer):
    """Says one word, then waits for ever, or dies if that is the prompt."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)

    def Generate(self, request: pb.GenerateRequest, context: Any) -> Iterator[pb.GenerateResponse]:
        gone = threading.Event()
        context.add_callback(gone.set)
        # Not after the wait: a call that is cancelled at its first word is never asked for a second.
        context.add_callback(self.ended.release)
        self.begun.release()
        yield pb.GenerateResponse(text="one")
        if request.text == "die":
            context.abort(grpc.StatusCode.UNAVAILABLE, "the engine is lost")
        gone.wait(60)


@pytest.fixture()
def engine(tmp_path: Path) -> Iterator[tuple[Engine, int]]:
    """The engine, and the port of a gateway in front of it."""
    scripted = Engine()  # type: ignore[abstract]  # the gateway calls no other rpc here
    server = grpc.server(ThreadPoolExecutor(8), options=KEEPALIVE)
    rpc.add_InferenceServicer_to_server(scripted, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    with gateway(f"unix:{tmp_path}/s", origins=["https://here.example"]) as port:
        yield scripted, port
    server.stop(None).wait()


def body(**more: Any) -> bytes:
    return json.dumps({"model": "e", "prompt": "say", **more}).encode()


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_engine(engine: tuple[Engine, int], stream: bool) -> None:
    scripted, port = engine
    data = body(stream=stream, n=3)
    with socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        for _ in range(3):
            assert scripted.begun.acquire(timeout=30)
    for _ in range(3):
        assert scripted.ended.acquire(timeout=30)


def test_an_engine_that_dies_ends_a_stream_with_an_error(engine: tuple[Engine, int]) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{engine[1]}/v1/completions", body(prompt="die", stream=True))
    with urllib.request.urlopen(request) as response:
        events = [json.loads(line.removeprefix(b"data: ")) for line in response if line.startswith(b"data: ")]
    assert events[0]["choices"][0]["text"] == "one"
    assert events[-1]["error"]["type"] == "server_error" and "lost" in events[-1]["error"]["message"]


def test_an_engine_that_dies_fails_a_whole_answer(engine: tuple[Engine, int]) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{engine[1]}/v1/completions", body(prompt="die"))
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as error:
        assert error.code == 503


def test_other_paths_are_said_to_be_none(engine: tuple[Engine, int]) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{engine[1]}/v1/chat/completions")
    with caught.value as error:
        assert error.code == 405 and json.loads(error.read())["error"]["code"] == "unknown_url"


def test_scripts_of_named_origins_may_call(engine: tuple[Engine, int]) -> None:
    def told(origin: str, method: str, **headers: str) -> dict[str, str]:
        url = f"http://127.0.0.1:{engine[1]}/v1/completions"
        request = urllib.request.Request(
            url, b"[]" if method == "POST" else None, {"Origin": origin, **headers}, method=method
        )
        try:
            with urllib.request.urlopen(request) as answer:
                return dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return dict(error.headers)

    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    first = told("https://here.example", "OPTIONS", **wanted)
    assert first["access-control-allow-origin"] == "https://here.example"
    assert first["access-control-allow-headers"] == "authorization" and "POST" in first["access-control-allow-methods"]
    # The script may read what went wrong too.
    assert told("https://here.example", "POST")["access-control-allow-origin"] == "https://here.example"
    for method in ("OPTIONS", "POST"):
        assert "access-control-allow-origin" not in told("https://there.example", method, **wanted)
