"""One way to serve rooms: authentication, error mapping, health, reflection, an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from services.common import auth, requests, tracing
from services.common.metrics import Counts, Metrics
from services.common.settings import Settings
from services.common.status import DEFAULT_STATUS_BYTES, MAX_STATUS_BYTES, STATUS_BYTES_KEY, fitted
from services.finetune.errors import FailedPrecondition, Internal, QuartetError, Unavailable

log = logging.getLogger("quartet")

MAX_MESSAGE_BYTES = 4 << 20
LEAVE_S = 1.0
"""A server that is told to end goes on so long after it says that it does not serve: clients turn to other replicas, and no
call meets the end of the connection."""
DRAIN_S = 10.0
"""Calls under way have so long then."""
CONNECTION_AGE_S = 300
"""Clients ask for addresses anew after so long, and find replicas that came later."""
FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
"""Codes of which OpenTelemetry says that the server failed; the others blame the caller."""
KEEPALIVE = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)
"""For every server: by default one ends a connection (too_many_pings) whose client pings more often than every 5 minutes,
and ours does while it waits."""


@dataclass(frozen=True, slots=True)
class Room:
    """A service ready to be served: its full gRPC name, how to add it to a server, its background work."""

    service: str
    add: Callable[[grpc.aio.Server], None]
    start: Callable[[], None] = lambda: None
    stop: Callable[[], None] = lambda: None
    counts: Counts = dict
    """Its resources by kind and state, for Prometheus."""
    collectors: Sequence[Any] = ()
    """Its own numbers for Prometheus."""


class Guard(grpc.aio.ServerInterceptor):
    """Stands before every rpc: checks the token, runs plain functions in threads, turns errors into statuses."""

    def __init__(self, token: str, metrics: Metrics) -> None:
        self._token = token
        self._metrics = metrics
        self.leaving = asyncio.Event()
        self._pool = ThreadPoolExecutor(max_workers=32, thread_name_prefix="rpc")

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(("/grpc.health.", "/grpc.reflection.")):
            return handler
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        watches = details.method.rpartition("/")[2].startswith("Watch")
        wrap = self._watching if watches else self._streaming if handler.response_streaming else self._single
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            wrap(getattr(handler, kind), details.method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _single(self, method: Callable[..., Any], path: str) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._measured(path, context):
                try:
                    self._check(context)
                    if inspect.iscoroutinefunction(method):
                        return await method(request, context)
                    run = functools.partial(method, request, context)
                    return await asyncio.get_running_loop().run_in_executor(self._pool, run)
                except Exception as error:
                    await self._abort(context, error)

        return call

    def _streaming(self, method: Callable[..., AsyncIterator[Any]], path: str) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with self._measured(path, context):
                try:
                    self._check(context)
                    async for answer in method(request, context):
                        yield answer
                except Exception as error:
                    await self._abort(context, error)

        return call

    @contextlib.contextmanager
    def _measured(self, path: str, context: grpc.aio.ServicerContext[Any, Any]) -> Iterator[None]:
        begun, code = time.perf_counter(), "CANCELLED"  # unless it comes to an end of its own
        metadata = context.invocation_metadata()
        number = requests.given(metadata)
        called = path.strip("/")
        service, _, method = called.partition("/")
        span = tracing.begin(called, metadata, rpc__system="grpc", rpc__service=service, rpc__method=method)
        try:
            yield
            code = "OK"
        except grpc.aio.AbortError:
            code = _code_name(context.code())
            raise
        finally:
            took = time.perf_counter() - begun
            self._metrics.ended(path, code, took)
            span.tell(rpc__grpc__status_code=grpc.StatusCode[code].value[0], quartet__request_id=number)
            span.end(code if code in FAULTS else "")
            if number:
                log.info("request %s: %s %s after %.3f s", number, path, code, took)

    def _watching(self, method: Callable[..., AsyncIterator[Any]], path: str) -> Callable[..., AsyncIterator[Any]]:
        """A stream that may go on for hours: its caller turns to another replica when this one leaves."""

        async def until_leaving(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            answers, leaving = aiter(method(request, context)), asyncio.ensure_future(self.leaving.wait())
            try:
                while True:
                    answer = asyncio.ensure_future(anext(answers))
                    await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
                    if not answer.done():
                        answer.cancel()
                        raise Unavailable("this replica ends; watch again from where you are", reason="SERVER_LEAVING")
                    yield answer.result()
            except StopAsyncIteration:
                return
            finally:
                leaving.cancel()

        return self._streaming(until_leaving, path)

    def _check(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if self._token:
            auth.check(self._token, tuple(context.invocation_metadata() or ()))

    @staticmethod
    async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
        if isinstance(error, grpc.aio.AbortError):
            raise error
        if isinstance(error, grpc.aio.AioRpcError):
            # A call that this room passed on: its status goes through as it came.
            trailing = error.trailing_metadata() or ()
            await context.abort(error.code(), error.details() or "", tuple(trailing))
        if not isinstance(error, QuartetError):
            incident = requests.given(context.invocation_metadata()) or uuid.uuid4().hex[:12]
            log.error("incident %s", incident, exc_info=error)
            error = Internal(
                f"a defect of this server; its log tells more under {incident}",
                reason="INTERNAL",
                metadata={"incident": incident},
            )
        status = rpc_status.to_status(fitted(error, _status_bytes(context)))
        await context.abort(status.code, status.details, status.trailing_metadata)


def _code_name(code: Any) -> str:
    """Of a status code, which gRPC gives as its enum or as a number."""
    return next((c.name for c in grpc.StatusCode if code in (c, c.value[0])), "UNKNOWN")


def _status_bytes(context: grpc.aio.ServicerContext[Any, Any]) -> int:
    """The largest status that the caller can take."""
    for key, value in context.invocation_metadata() or ():
        if key == STATUS_BYTES_KEY and str(value).isdecimal():
            return min(max(int(value), DEFAULT_STATUS_BYTES), MAX_STATUS_BYTES)
    return DEFAULT_STATUS_BYTES


class Server:
    """A server of some rooms, started by `open` and ended by `close`."""

    def __init__(self, settings: Settings, rooms: Sequence[Room]) -> None:
        self.settings = settings
        self.rooms = rooms
        self.address = ""
        self._close_metrics: Callable[[], None] = lambda: None

    async def open(self) -> None:
        """Listen and start the rooms' background work. FailedPrecondition (PORT_IN_USE, ADDRESS_UNUSABLE)."""
        token = auth.read_token(self.settings.token_file) if self.settings.token_file else ""
        metrics = Metrics([collector for room in self.rooms for collector in room.collectors])
        self._guard = Guard(token, metrics)
        self._server = grpc.aio.server(interceptors=[self._guard], options=_options())
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for room in self.rooms:
            room.add(self._server)
        if self.settings.reflection == "on" or (self.settings.reflection == "auto" and self.settings.loopback):
            from grpc_reflection.v1alpha import reflection

            names = [*(room.service for room in self.rooms), health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection.enable_server_reflection(names, self._server)
        self.address = self._listen()
        if self.settings.metrics_port:
            counts = [room.counts for room in self.rooms]
            self._close_metrics = metrics.listen(self.settings.host, self.settings.metrics_port, counts)
        await self._server.start()
        for room in self.rooms:
            room.start()
        for name in ["", *(room.service for room in self.rooms)]:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        if self.settings.address_file:
            part = Path(self.settings.address_file + ".part")
            part.write_text(self.address)
            part.rename(self.settings.address_file)

    async def close(self) -> None:
        """Let clients turn to others and running calls end, then stop the background work."""
        await self._health.enter_graceful_shutdown()
        self._guard.leaving.set()
        if self.settings.replicated:
            await asyncio.sleep(LEAVE_S)
        await self._server.stop(DRAIN_S)
        for room in self.rooms:
            await asyncio.to_thread(room.stop)
        await asyncio.to_thread(self._close_metrics)
        await asyncio.to_thread(tracing.flush)

    def _listen(self) -> str:
        host, port = self.settings.host, self.settings.port
        wanted = host if host.startswith("unix:") else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if host.startswith("unix:"):
            _check_socket(host.removeprefix("unix:"))
        try:
            credentials = _tls(self.settings)
            bound = (
                self._server.add_secure_port(wanted, credentials)
                if credentials
                else self._server.add_insecure_port(wanted)
            )
        except RuntimeError as error:
            raise FailedPrecondition(
                f"cannot listen on {wanted}: the address is in use, or not this machine's; choose another --port",
                reason="PORT_IN_USE",
            ) from error
        return wanted if host.startswith("unix:") else wanted.rpartition(":")[0] + f":{bound}"


def _check_socket(path: str) -> None:
    """gRPC would take a living server's socket away silently."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return
    raise FailedPrecondition(f"cannot listen on unix:{path}: the address is in use", reason="PORT_IN_USE")


def _options() -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Without this a second server would share the port silently, and clients would meet either.
        ("grpc.so_reuseport", 0),
        *KEEPALIVE,
        # Calls under way are let end, however long they take.
        ("grpc.max_connection_age_ms", CONNECTION_AGE_S * 1000),
    ]


def _tls(settings: Settings) -> grpc.ServerCredentials | None:
    if not settings.tls_cert:
        return None
    try:
        pair = (Path(settings.tls_key).read_bytes(), Path(settings.tls_cert).read_bytes())
        ca = Path(settings.tls_client_ca).read_bytes() if settings.tls_client_ca else None
    except OSError as error:
        raise FailedPrecondition(f"cannot read {error.filename}", reason="ADDRESS_UNUSABLE") from error
    return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)


Beside = Callable[[str], contextlib.AbstractContextManager[Any]]
"""What goes on beside a server while it serves, by its address."""


def run(settings: Settings, rooms: Sequence[Room], beside: Beside = contextlib.nullcontext) -> None:
    """Serve until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    asyncio.run(_serve(Server(settings, rooms), beside))


async def _serve(server: Server, beside: Beside) -> None:
    ended = asyncio.Event()
    # First: whoever reads the address that `open` tells may end the server at once.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await server.open()
    served = ", ".join(room.service.split(".")[1] for room in server.rooms)
    print(f"quartet: serving {served} on {server.address}", flush=True)
    held = contextlib.ExitStack()
    held.enter_context(beside(server.address))
    await ended.wait()
    # In a thread: what ends may still be calling this server.
    await asyncio.to_thread(held.close)
    await server.close()


def main(
    prog: str,
    builders: Iterable[Callable[[Settings], Room]],
    settings: Settings | None = None,
    beside: Beside = contextlib.nullcontext,
) -> None:
    """The main function of a service: settings, rooms, run; errors as one line and a true exit status."""
    # Thread pools that spin would fight the workers for the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    tracing.name_process(prog)
    try:
        settings = settings or Settings.from_args(sys.argv[1:], prog)
        run(settings, [build(settings) for build in builders], beside)
    except QuartetError as error:
        print(f"{prog}: {error.message}", file=sys.stderr)
        sys.exit(error.exit_status)
