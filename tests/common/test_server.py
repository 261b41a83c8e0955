"""A real server with one room of generic handlers, one of each kind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.client.client import OPTIONS
from services.common import auth
from services.common.server import KEEPALIVE
from services.common.status import from_rpc_error
from services.finetune.errors import Internal, InvalidArgument, QuartetError, Unauthenticated

PROBE = """
import sys
import grpc
from services.common import server
from services.finetune.errors import InvalidArgument

def fail(data):
    if data == b"bad":
        raise InvalidArgument("that is bad", reason="BAD", metadata={"k": "v"})
    if data == b"bug":
        raise RuntimeError("a secret of the server")
    return data

def unary_unary(request, context):
    return fail(request)
async def unary_stream(request, context):
    yield b"first"
    yield fail(request)
async def stream_unary(requests, context):
    return b"".join([fail(r) async for r in requests])
async def stream_stream(requests, context):
    async for request in requests:
        yield fail(request)

def add(target):
    handlers = {f.__name__: getattr(grpc, f.__name__ + "_rpc_method_handler")(f) for f in
                (unary_unary, unary_stream, stream_unary, stream_stream)}
    target.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("quartet.probe.v1.Probe", handlers),))

server.main("probe", [lambda settings: server.Room("quartet.probe.v1.Probe", add)])
"""
KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


class Probe:
    def __init__(self, home: Path, *flags: str) -> None:
        file = home / "address"
        self.log = home / "log"
        command = [sys.executable, "-c", PROBE, "--home", str(home), "--port", "0", "--address-file", str(file), *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not file.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        self.address = file.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    running = Probe(tmp_path_factory.mktemp("p"))
    yield running
    assert running.stop() == 0


def call(channel: grpc.Channel, kind: str, data: bytes, **words: Any) -> list[bytes]:
    asked = iter([data]) if kind.startswith("stream") else data
    answer = getattr(channel, kind)(f"/quartet.probe.v1.Probe/{kind}")(asked, timeout=10, **words)
    return list(answer) if kind.endswith("stream") else [answer]


def error_of(channel: grpc.Channel, kind: str, data: bytes, **words: Any) -> QuartetError:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, kind, data, **words)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_every_kind_of_rpc(probe: Probe, kind: str) -> None:
    with grpc.insecure_channel(probe.address) as channel:
        assert call(channel, kind, b"ok")[-1] == b"ok"
        bad = error_of(channel, kind, b"bad")
        assert type(bad) is InvalidArgument and (bad.reason, bad.metadata) == ("BAD", {"k": "v"})
        bug = error_of(channel, kind, b"bug")
        assert type(bug) is Internal and "secret" not in bug.message
        assert bug.metadata["incident"] in probe.log.read_text()
        assert "a secret of the server" in probe.log.read_text()
        assert error_of(channel, kind, b"bug").metadata != bug.metadata


def test_pings_are_asked_for_less_often_than_they_are_taken() -> None:
    taken, asked = dict[str, Any](KEEPALIVE), dict[str, Any](OPTIONS)
    assert asked["grpc.keepalive_time_ms"] >= 2 * taken["grpc.http2.min_ping_interval_without_data_ms"]
    assert taken["grpc.keepalive_permit_without_calls"] == 1


@pytest.mark.slow
def test_a_silent_stream_is_held_by_pings(probe: Probe) -> None:
    """A server of gRPC's defaults ends it after the third: UNAVAILABLE, too_many_pings."""
    often = [("grpc.keepalive_time_ms", 11_000), ("grpc.http2.max_pings_without_data", 0)]
    with grpc.insecure_channel(probe.address, often) as channel:
        stream = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=50)
        assert next(stream).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            next(stream)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_health_and_reflection(probe: Probe) -> None:
    with grpc.insecure_channel(probe.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "quartet.probe.v1.Probe"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        answer = next(iter(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked)))
        assert "quartet.probe.v1.Probe" in [s.name for s in answer.list_services_response.service]
    ready = [line for line in probe.log.read_text().splitlines() if line.startswith("quartet: serving")]
    assert ready == [f"quartet: serving probe on {probe.address}"]


def refused_start(home: Path, *flags: str) -> str:
    command = [sys.executable, "-c", PROBE, "--home", str(home), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode not in (0, 1, 2) and "Traceback" not in done.stderr
    return done.stderr


def test_a_port_in_use_is_said_in_one_line(probe: Probe, tmp_path: Path) -> None:
    port = probe.address.rpartition(":")[2]
    text = refused_start(tmp_path, "--port", port)
    assert "in use" in text and port in text
    assert [line for line in text.splitlines() if line.startswith("probe:")]


def test_a_living_servers_socket_is_not_taken(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    first = Probe(tmp_path, "--host", address)
    assert "in use" in refused_start(tmp_path / "other", "--host", address)
    with grpc.insecure_channel(address) as channel:
        assert call(channel, "unary_unary", b"ok") == [b"ok"]
    first.process.kill()  # leaves its socket behind, which the next server may take
    first.process.wait()
    (tmp_path / "address").unlink()
    assert Probe(tmp_path, "--host", address).stop() == 0


def test_the_token_is_needed_but_not_for_health(tmp_path: Path) -> None:
    token = "correct-horse-battery"
    (tmp_path / "token").write_text(token)
    probe = Probe(tmp_path, "--token-file", str(tmp_path / "token"))
    with grpc.insecure_channel(probe.address) as channel:
        for kind in KINDS:
            missing = error_of(channel, kind, b"ok")
            assert type(missing) is Unauthenticated and missing.reason == "TOKEN_MISSING"
            wrong = error_of(channel, kind, b"ok", metadata=auth.bearer(token + "x"))
            assert wrong.reason == "TOKEN_WRONG"
            assert call(channel, kind, b"ok", metadata=auth.bearer(token))[-1] == b"ok"
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert probe.stop() == 0


def test_a_missing_token_file_stops_the_start(tmp_path: Path) -> None:
    assert "token file" in refused_start(tmp_path, "--token-file", str(tmp_path / "none"))


def certificate(folder: Path, name: str, ca: str = "") -> None:
    """A certificate for 127.0.0.1: its own, or signed by `ca`."""
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    made += ["-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", f"/CN={name}"]
    made += ["-CA", f"{ca}.crt", "-CAkey", f"{ca}.key", "-addext", "subjectAltName=IP:127.0.0.1"] if ca else []
    made += ["-addext", "basicConstraints=critical,CA:FALSE"] if ca else []
    subprocess.run(made, cwd=folder, check=True, capture_output=True)


def test_mutual_tls(tmp_path: Path) -> None:
    certificate(tmp_path, "ca")
    for name in ("server", "client"):
        certificate(tmp_path, name, "ca")
    certificate(tmp_path, "stranger")
    at = {name: str(tmp_path / name) for name in ("server.crt", "server.key", "ca.crt")}
    flags = ("--tls-cert", at["server.crt"], "--tls-key", at["server.key"], "--tls-client-ca", at["ca.crt"])
    probe = Probe(tmp_path, *flags)

    def read(name: str) -> bytes:
        return (tmp_path / name).read_bytes()

    good = grpc.ssl_channel_credentials(read("ca.crt"), read("client.key"), read("client.crt"))
    with grpc.secure_channel(probe.address, good) as channel:
        assert call(channel, "unary_unary", b"ok") == [b"ok"]
    strange = grpc.ssl_channel_credentials(read("ca.crt"), read("stranger.key"), read("stranger.crt"))
    for credentials in (strange, grpc.ssl_channel_credentials(read("ca.crt"))):
        with grpc.secure_channel(probe.address, credentials) as channel:
            assert error_of(channel, "unary_unary", b"ok").code == "UNAVAILABLE"
    assert probe.stop() == 0


def test_a_port_taken_by_a_stranger(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert "in use" in refused_start(tmp_path, "--port", str(other.getsockname()[1]))


def test_running_calls_end_before_the_server(tmp_path: Path) -> None:
    probe = Probe(tmp_path)
    go = threading.Event()

    def asked() -> Any:
        yield b"a"
        go.wait()
        yield b"b"

    with grpc.insecure_channel(probe.address) as channel:
        running: Any = channel.stream_unary("/quartet.probe.v1.Probe/stream_unary").future(asked())
        time.sleep(0.2)
        os.kill(probe.process.pid, signal.SIGTERM)
        time.sleep(0.2)
        go.set()
        assert running.result(timeout=10) == b"ab"
    assert probe.process.wait(timeout=20) == 0
