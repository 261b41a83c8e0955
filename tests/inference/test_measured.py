"""What Prometheus is told on an answer's way, and the request id that goes along it."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from quartet.inference.v1 import inference_pb2 as pb

from tests.common.test_metrics import scrape
from tests.inference.conftest import READY, Service, publish, until
from tests.inference.wire import endpoint, turns

ANSWER = {("length",): 1.0}


def test_an_engine_tells_of_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("QUARTET_ENGINE_METRICS_PORT", str(port))
    service = Service(tmp_path)
    publish(service.store, tmp_path / "models")
    service.start()
    try:
        name = endpoint(service.stub, "measured", adapters=[("brief", "one")]).name
        service.wait_for(name, READY)
        request = pb.ChatRequest(endpoint=name, messages=turns("hi"), sampling=pb.Sampling(max_tokens=5))
        list(service.stub.Chat(request, metadata=(("x-request-id", "asked-by-me"),)))
        until(lambda: scrape(port)["quartet_answers_total"] == ANSWER, 60)
        told = scrape(port)
        assert told["quartet_adapters"] == {(): 1} and told["quartet_first_token_seconds_count"] == {(): 1}
        assert told["quartet_tokens_total"][("answer",)] == 5
        # A machine has the port once: the next engine answers without.
        service.wait_for(endpoint(service.stub, "beside").name, READY)
        assert f"no metrics: port {port}" in service.logs()
        until(lambda: service.logs().count("request asked-by-me: /quartet.inference.v1.Inference/Chat OK") == 2, 60)
    finally:
        assert service.stop() == 0
