"""What a server tells Prometheus: calls by rpc and code, how long they took, and jobs by state.

Nothing of a caller or of a resource's name is in a label: their number stays small, and who scrapes sees no data.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily

from services.common import tracing
from services.finetune.errors import FailedPrecondition, QuartetError

T = TypeVar("T")
LENGTH = 2
"""FINISH_REASON_LENGTH of the inference contract."""
TOKEN_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

Counts = Callable[[], Mapping[tuple[str, str], int]]
"""How many resources there are, by (kind, state); asked at every scrape. May raise QuartetError: then none are told."""


class Metrics:
    """One server's numbers, in a registry of its own. `listen` shows them at http://host:port/metrics."""

    def __init__(self, collectors: Iterable[Any] = ()) -> None:
        """`collectors` are the numbers of its rooms."""
        self.registry = CollectorRegistry()
        for collector in collectors:
            self.registry.register(collector)
        labels = ["service", "method"]
        self._calls = Counter("quartet_rpcs", "Calls that ended.", [*labels, "code"], registry=self.registry)
        self._seconds = Histogram(
            "quartet_rpc_seconds", "How long calls took.", labels, buckets=BUCKETS_S, registry=self.registry
        )

    def ended(self, path: str, code: str, seconds: float) -> None:
        """A call of /package.Service/Method ended."""
        service, _, method = path.strip("/").partition("/")
        self._calls.labels(service, method, code).inc()
        self._seconds.labels(service, method).observe(seconds)

    def listen(self, host: str, port: int, counts: Iterable[Counts]) -> Callable[[], None]:
        """Show them until the returned function is called. FailedPrecondition (PORT_IN_USE)."""
        self.registry.register(_Resources(list(counts)))
        try:
            server, thread = start_http_server(port, host, self.registry)
        except OSError as error:
            raise FailedPrecondition(
                f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --metrics-port",
                reason="PORT_IN_USE",
            ) from error

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close


class Answers:
    """The numbers of answers that are streamed, told alike by all that they pass through: an engine, the inference service,
    a gateway. What each adds is the difference."""

    def __init__(self) -> None:
        self._first = Histogram(
            "quartet_first_token_seconds", "From a question to its first token.", buckets=BUCKETS_S, registry=None
        )
        self._between = Histogram(
            "quartet_token_seconds", "Between two tokens of an answer.", buckets=TOKEN_BUCKETS_S, registry=None
        )
        self._tokens = Counter("quartet_tokens", "Tokens of prompts and of answers.", ["of"], registry=None)
        self._ended = Counter("quartet_answers", "Answers that ended, by how.", ["end"], registry=None)
        self._running = Gauge("quartet_answers_running", "Answers that have begun.", registry=None)
        self._waiting = Gauge("quartet_answers_waiting", "Questions without a first token.", registry=None)
        self.collectors = (self._first, self._between, self._tokens, self._ended, self._running, self._waiting)

    async def counted(self, answer: AsyncIterator[T]) -> AsyncIterator[T]:
        """`answer`, whose pieces are ChatResponse or GenerateResponse, as it is."""
        since, begun, end = time.perf_counter(), False, "cancelled"  # unless it comes to an end of its own
        self._waiting.inc()
        try:
            async with aclosing(answer) as pieces:  # type: ignore[type-var]  # a stream can be closed
                async for piece in pieces:
                    count, now = len(piece.token_ids), time.perf_counter()  # type: ignore[attr-defined]  # see above
                    if count:
                        self._tokens.labels("answer").inc(count)
                        if begun:
                            # A piece may hold several tokens: each took its part of the time.
                            self._between.observe((now - since) / count)
                        else:
                            self._first.observe(now - since)
                            self._waiting.dec()
                            self._running.inc()
                            tracing.current().event("first token")
                        since, begun = now, True
                    if piece.finish_reason:  # type: ignore[attr-defined]
                        end = "length" if piece.finish_reason == LENGTH else "stop"  # type: ignore[attr-defined]
                        usage = piece.usage  # type: ignore[attr-defined]
                        self._tokens.labels("prompt").inc(usage.prompt_tokens)
                        tracing.current().event(
                            "last token",
                            gen_ai__usage__input_tokens=usage.prompt_tokens,
                            gen_ai__usage__output_tokens=usage.completion_tokens,
                        )
                    yield piece
        except Exception:
            end = "error"
            raise
        finally:
            (self._running if begun else self._waiting).dec()
            self._ended.labels(end).inc()


class _Resources:
    """Jobs and endpoints by state, as the database has them at the moment of the scrape."""

    def __init__(self, counts: Iterable[Counts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Any]:
        told = GaugeMetricFamily("quartet_resources", "Jobs and endpoints.", labels=["kind", "state"])
        for counts in self._counts:
            try:
                for (kind, state), number in counts().items():
                    told.add_metric([kind, state], number)
            except QuartetError:
                continue  # the calls are told all the same
        yield told

    def describe(self) -> Iterator[Any]:
        yield from ()
