"""A receiver of traces, as a collector is one: OTLP over HTTP and over gRPC, on free ports."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc


@dataclass(frozen=True)
class Seen:
    """A span as it arrived; its ids in hex, as headers have them."""

    process: str
    name: str
    trace: str
    own: str
    parent: str
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]
    failed: bool


@dataclass
class Collector:
    endpoints: dict[str, str] = field(default_factory=dict)
    """By OTEL_EXPORTER_OTLP_PROTOCOL."""
    spans: list[Seen] = field(default_factory=list)

    def Export(self, request: otlp.ExportTraceServiceRequest, context: Any) -> otlp.ExportTraceServiceResponse:
        for group in request.resource_spans:
            process = _plain(group.resource.attributes)["service.name"]
            self.spans += [_seen(process, span) for scope in group.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces" and self.headers.get("content-encoding") is None
            data = self.rfile.read(int(self.headers["content-length"]))
            said = collector.Export(otlp.ExportTraceServiceRequest.FromString(data), None).SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever)
    thread.start()
    server = grpc.server(ThreadPoolExecutor(2))
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    collector.endpoints = {
        "http/protobuf": f"http://127.0.0.1:{web.server_address[1]}",
        "grpc": f"http://127.0.0.1:{port}",
    }
    try:
        yield collector
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
        server.stop(None).wait()


def _seen(process: str, span: Any) -> Seen:
    events = {event.name: _plain(event.attributes) for event in span.events}
    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
    return Seen(process, span.name, *ids, _plain(span.attributes), events, span.status.code == 2)


def _plain(attributes: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in attributes}
