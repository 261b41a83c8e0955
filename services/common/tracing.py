"""Traces by OpenTelemetry: a span for each request that a gateway, a service or an engine server answers.

OpenTelemetry's own variables say where spans go (OTEL_EXPORTER_OTLP_ENDPOINT, …_PROTOCOL, …_HEADERS), which are kept
(OTEL_TRACES_SAMPLER) and what this process is called (OTEL_SERVICE_NAME). Without an endpoint nothing of it is imported; a
caller's `traceparent` goes along all the same. The extra `tracing` brings it.

Source of the names: OpenTelemetry's semantic conventions 1.40, "RPC", "HTTP", "Generative AI"; of the headers: W3C Trace
Context, Baggage.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Protocol

log = logging.getLogger("quartet")

HEADERS = ("traceparent", "tracestate", "baggage")
MOST_CHARACTERS = 8192
"""Of a header that is passed on; W3C's limit for baggage."""
END_S = 2.0
"""What is not sent yet when a server ends has so long."""

Metadata = Iterable[tuple[str, str | bytes]]


class Span(Protocol):
    """A request under way."""

    def event(self, name: str, **attributes: str | int) -> None:
        """Something happened now."""

    def tell(self, **attributes: str | int) -> None:
        """What is known of it; `__` in a name stands for a dot."""

    def end(self, failed: str = "") -> None:
        """It is over; `failed` says how, if a fault of this side ended it. Once."""


class _Untraced:
    def event(self, name: str, **attributes: str | int) -> None: ...

    def tell(self, **attributes: str | int) -> None: ...

    def end(self, failed: str = "") -> None: ...


# What this request's task does and passes on. Each request has a task of its own, so neither is ever set back.
_UNTRACED = _Untraced()
_current: ContextVar[Span] = ContextVar("span", default=_UNTRACED)
_onward: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("onward", default=())
_process = "quartet"


def begin(name: str, metadata: Metadata | None, **attributes: str | int) -> Span:
    """The span of a request that came with this metadata or these headers, as what the rest of this task is about."""
    shown = tuple(
        (key, value) for key, value in metadata or () if key in HEADERS and isinstance(value, str) and _passable(value)
    )
    tracer = _tracer()
    span = _UNTRACED if tracer is None else tracer.begin(name, dict(shown))
    span.tell(**attributes)
    _current.set(span)
    _onward.set(shown if tracer is None else tracer.onward(span))
    return span


def current() -> Span:
    """That of this task's request."""
    return _current.get()


def along() -> tuple[tuple[str, str], ...]:
    """The metadata that makes what is called next a part of this task's trace."""
    return _onward.get()


def name_process(name: str) -> None:
    """What this process is called where OTEL_SERVICE_NAME does not say; before its first request."""
    global _process
    _process = name
    _tracer()  # what it imports takes a while


def flush() -> None:
    """Send what has ended, for END_S at most."""
    tracer = _tracer()
    if tracer is not None:
        # Aside: an exporter whose collector is away tries again and again, whatever time it is given.
        sending = threading.Thread(target=tracer.provider.force_flush, daemon=True)
        sending.start()
        sending.join(END_S)


def _passable(value: str) -> bool:
    return len(value) <= MOST_CHARACTERS and value.isascii() and value.isprintable()


def _wanted() -> bool:
    told = os.environ.get
    to = told("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or told("OTEL_EXPORTER_OTLP_ENDPOINT")
    off = told("OTEL_SDK_DISABLED", "").lower() == "true" or told("OTEL_TRACES_EXPORTER", "otlp") != "otlp"
    return bool(to) and not off


@functools.cache
def _tracer() -> _Tracer | None:
    if not _wanted():
        return None
    try:
        return _Tracer()
    except ImportError as error:
        log.warning("no traces: OTEL_EXPORTER_OTLP_ENDPOINT needs the extra tracing (%s)", error)
        return None


class _Tracer:
    """OpenTelemetry's, of this process."""

    def __init__(self) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._trace, self._propagate = trace, propagate
        named = "OTEL_SERVICE_NAME" in os.environ or SERVICE_NAME in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {SERVICE_NAME: _process})
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(_exporter()))
        self._tracer = self.provider.get_tracer("quartet")

    def begin(self, name: str, shown: dict[str, str]) -> Span:
        context = self._propagate.extract(shown)
        return _Traced(self._tracer.start_span(name, context, self._trace.SpanKind.SERVER), context)

    def onward(self, span: Any) -> tuple[tuple[str, str], ...]:
        carrier: dict[str, str] = {}
        self._propagate.inject(carrier, self._trace.set_span_in_context(span.span, span.context))
        return tuple(carrier.items())


class _Traced:
    """OpenTelemetry's span. Its status is an error only for faults of this side, as the conventions have it for servers."""

    def __init__(self, span: Any, context: Any) -> None:
        self.span, self.context = span, context

    def event(self, name: str, **attributes: str | int) -> None:
        self.span.add_event(name, _dotted(attributes))

    def tell(self, **attributes: str | int) -> None:
        self.span.set_attributes(_dotted(attributes))

    def end(self, failed: str = "") -> None:
        from opentelemetry.trace import Status, StatusCode

        if failed:
            self.span.set_status(Status(StatusCode.ERROR, failed))
            self.tell(error__type=failed)
        self.span.end()


def _dotted(attributes: dict[str, str | int]) -> dict[str, str | int]:
    return {name.replace("__", "."): value for name, value in attributes.items()}


def _exporter() -> Any:
    told = os.environ.get
    protocol = told("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or told("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter

        return trace_exporter.OTLPSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
