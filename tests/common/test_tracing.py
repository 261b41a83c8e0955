"""Spans by OpenTelemetry's variables, to a receiver that speaks its protocol; nothing of it without them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from services.common import tracing
from tests.common.collector import collecting

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a process that has not begun."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_SERVICE_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracing, "_process", "a-test")
    tracing._tracer.cache_clear()
    yield
    tracer = tracing._tracer()
    if tracer is not None:
        tracer.provider.shutdown()
    tracing._tracer.cache_clear()


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_spans_arrive(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoints[protocol])
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        span = tracing.begin("first", [("traceparent", PARENT), ("other", b"\0")], rpc__system="grpc")
        span.event("first token", gen_ai__usage__output_tokens=1)
        onward = tracing.along()
        span.end("INTERNAL")
        tracing.begin("second", onward).end()
        tracing.flush()
        first, second = collector.spans
        fresh = tracing._tracer()
        assert fresh is not None
        fresh.provider.shutdown()
    assert (first.process, first.name, first.failed, second.failed) == ("a-test", "first", True, False)
    assert f"00-{first.trace}-{first.parent}-01" == PARENT
    assert (second.trace, second.parent) == (first.trace, first.own)
    assert first.attributes == {"rpc.system": "grpc", "error.type": "INTERNAL"}
    assert first.events == {"first token": {"gen_ai.usage.output_tokens": 1}}


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none"), ("OTHER", "")]
)
def test_who_is_not_asked_passes_on_what_came(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if value:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setenv(name, value)
    span = tracing.begin("first", [("traceparent", PARENT), ("baggage", "a\nb"), ("tracestate", "x" * 9000)], a=1)
    span.event("first token")
    span.end("INTERNAL")
    tracing.flush()
    assert tracing.along() == (("traceparent", PARENT),) and tracing._tracer() is None


def test_nothing_is_imported_unasked() -> None:
    program = (
        "import sys; from services.common import server, tracing; tracing.name_process('a');"
        "tracing.begin('b', ()).end(); print([m for m in sys.modules if m.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_extra_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    for _ in range(2):
        tracing.begin("a", ()).end()
    assert [r.getMessage().partition(" (")[0] for r in caplog.records] == [
        "no traces: OTEL_EXPORTER_OTLP_ENDPOINT needs the extra tracing"
    ]


def test_an_end_waits_for_no_collector_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    back, sent = threading.Event(), list[bool]()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracer = tracing._tracer()
    assert tracer is not None
    monkeypatch.setattr(tracer.provider, "force_flush", lambda: sent.append(back.wait(60)))
    monkeypatch.setattr(tracing, "END_S", 0.01)
    tracing.flush()
    assert not sent
    back.set()
