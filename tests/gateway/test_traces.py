"""One trace of a question's way: caller, gateway, service, engine, each a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest

from tests.common.collector import collecting
from tests.inference.conftest import READY, Service, publish, until
from tests.inference.wire import endpoint

TRACES = {"0af7651916cd43dd8448eb211c80319c": False, "1af7651916cd43dd8448eb211c80319c": True}
"""By id: whether the answer is streamed."""
CALLER = "b7ad6b7169203331"
CHAT = "quartet.inference.v1.Inference/Chat"


@contextmanager
def gateway(folder: Path, address: str) -> Iterator[openai.OpenAI]:
    """The SDK on a gateway in a process of its own."""
    command = [sys.executable, "-m", "services.gateway", "--port", "0", "--endpoint", address, "--pages", "off"]
    with (folder / "gateway.log").open("wb") as log:
        running = subprocess.Popen([*command, "--address-file", str(folder / "url")], stdout=log, stderr=log)
    try:
        until((folder / "url").exists, 60, (folder / "gateway.log").read_text)
        with openai.OpenAI(base_url=(folder / "url").read_text() + "/v1", api_key="none", max_retries=0) as client:
            yield client
    finally:
        running.terminate()
        assert running.wait(60) == 0


def test_a_question_is_one_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoints["http/protobuf"])
        service = Service(tmp_path)
        publish(service.store, tmp_path / "models")
        service.start()
        try:
            service.wait_for(endpoint(service.stub, "traced").name, READY)
            with gateway(tmp_path, service.address) as client:
                for trace, stream in TRACES.items():
                    said = client.chat.completions.create(
                        model="traced",
                        messages=[{"role": "user", "content": "hi"}],
                        max_tokens=5,
                        stream=stream,
                        extra_headers={"traceparent": f"00-{trace}-{CALLER}-01", "x-request-id": "mine"},
                    )
                    assert list(said)
        finally:
            assert service.stop() == 0
        until(lambda: all(sum(s.trace == trace for s in collector.spans) == 3 for trace in TRACES), 60)
    for trace in TRACES:
        of = {s.process: s for s in collector.spans if s.trace == trace}
        gateway_, service_, engine = (of[f"quartet-{name}"] for name in ("gateway", "inference", "engine"))
        assert [gateway_.parent, service_.parent, engine.parent] == [CALLER, gateway_.own, service_.own]
        assert [gateway_.name, service_.name, engine.name] == ["POST /v1/chat/completions", CHAT, CHAT]
        for span in of.values():
            assert span.attributes["quartet.request_id"] == "mine" and not span.failed
            assert span.events["last token"]["gen_ai.usage.output_tokens"] == 5 and "first token" in span.events
    # What has no caller's trace, like the endpoint's creation, has one of its own; health checks have none.
    others = {s.name for s in collector.spans if s.trace not in TRACES}
    assert "quartet.inference.v1.Inference/CreateEndpoint" in others and not any("health" in name for name in others)
