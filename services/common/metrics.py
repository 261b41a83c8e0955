"""What a server tells Prometheus: calls by rpc and code, how long they took, and jobs by state.

Nothing of a caller or of a resource's name is in a label: their number stays small, and who scrapes sees no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily

from services.finetune.errors import FailedPrecondition, QuartetError

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

Counts = Callable[[], Mapping[tuple[str, str], int]]
"""How many resources there are, by (kind, state); asked at every scrape. May raise QuartetError: then none are told."""


class Metrics:
    """One server's numbers, in a registry of its own. `listen` shows them at http://host:port/metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
