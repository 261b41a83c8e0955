"""A rolling update under load: two servers behind one client's round robin, replaced one after the other."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from services.client.client import OPTIONS
from services.client.retry import Room
from services.common.status import from_rpc_error
from services.finetune.errors import QuartetError, Unavailable
from tests.common.test_server import PROBE, Probe

CALL = "/quartet.probe.v1.Probe/"
AGED = PROBE.replace("server.main(", "server.CONNECTION_AGE_S = 1\nserver.main(")


class Replica:
    """A probe at one address, whichever process serves it."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, "0"
        self.start()

    def start(self) -> None:
        self.home.mkdir(exist_ok=True)
        (self.home / "address").unlink(missing_ok=True)
        # A database that others may share, which the probe never opens.
        self.probe = Probe(self.home, "--port", self.port, "--database-url", "postgresql+psycopg://nobody@none/none")
        self.address = self.probe.address
        self.port = self.address.rpartition(":")[2]

    def replace(self) -> None:
        self.probe.process.send_signal(signal.SIGTERM)
        assert self.probe.process.wait(timeout=60) == 0
        self.start()


@pytest.fixture()
def replicas(tmp_path: Path) -> Iterator[list[Replica]]:
    made = [Replica(tmp_path / str(n)) for n in range(2)]
    yield made
    for replica in made:
        assert replica.probe.stop() == 0


class Load:
    """Threads that call without a pause, as the shipped client does, until `stop`."""

    def __init__(self, channel: grpc.Channel, threads: int) -> None:
        self.done: Counter[str] = Counter()
        self.errors: list[QuartetError] = []
        self._ended = threading.Event()
        stub = SimpleNamespace(
            Ask=channel.unary_unary(CALL + "unary_unary"), Chat=channel.unary_stream(CALL + "unary_stream")
        )
        self._room = Room(stub, (), "the replicas")
        self._threads = [threading.Thread(target=self._call, args=(n % 2 == 0,)) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def _call(self, streams: bool) -> None:
        while not self._ended.is_set():
            try:
                answer: Any = list(self._room.Chat(b"x"))[-1] if streams else self._room.Ask(b"x")
                assert answer == b"x"
                self.done["stream" if streams else "unary"] += 1
            except QuartetError as error:
                self.errors.append(error)

    def more(self, calls: int) -> None:
        """Wait for so many calls of each kind."""
        before, deadline = self.done.copy(), time.monotonic() + 60
        while any(self.done[kind] < before[kind] + calls for kind in ("stream", "unary")):
            assert time.monotonic() < deadline and not self.errors, self.errors
            time.sleep(0.01)

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def test_no_call_fails_while_replicas_are_replaced(replicas: list[Replica]) -> None:
    target = "ipv4:" + ",".join(replica.address for replica in replicas)
    with grpc.insecure_channel(target, OPTIONS) as channel:
        load = Load(channel, 4)
        try:
            load.more(50)
            for replica in replicas * 2:
                replica.replace()
                load.more(50)
        finally:
            load.stop()
    assert load.errors == []
    assert sum(load.done.values()) > 400


def test_connections_are_made_anew_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By this a client meets replicas that came later; a call under way is let end."""
    monkeypatch.setattr("tests.common.test_server.PROBE", AGED)
    probe = Probe(tmp_path)
    go = threading.Event()

    def asked() -> Iterator[bytes]:
        yield b"a"
        go.wait(20)
        yield b"b"

    with grpc.insecure_channel(probe.address, OPTIONS) as channel:
        summed: Any = channel.stream_unary(CALL + "stream_unary")
        ask: Any = channel.unary_unary(CALL + "unary_unary")
        running = summed.future(asked())
        lost = threading.Event()
        begun = threading.Event()

        def changed(state: grpc.ChannelConnectivity) -> None:
            if begun.is_set() and state is not grpc.ChannelConnectivity.READY:
                lost.set()

        channel.subscribe(changed)
        assert ask(b"x", timeout=10) == b"x"
        begun.set()
        assert lost.wait(20), "the connection was kept"
        go.set()
        assert running.result(timeout=20) == b"ab"
        assert ask(b"x", timeout=10) == b"x"
    assert probe.stop() == 0


def test_who_watches_is_sent_on_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream without an end would hold the server up until it is cut off without a word."""
    watch = (
        "async def watch(request, context):\n    yield b'here'\n    await __import__('asyncio').sleep(600)\n\ndef add("
    )
    listed = 'handlers["WatchIt"] = grpc.unary_stream_rpc_method_handler(watch)\n    target.add_generic'
    monkeypatch.setattr(
        "tests.common.test_server.PROBE", PROBE.replace("def add(", watch).replace("target.add_generic", listed)
    )
    probe = Probe(tmp_path)
    with grpc.insecure_channel(probe.address, OPTIONS) as channel:
        watching: Any = channel.unary_stream(CALL + "WatchIt")
        answers = watching(b"x")
        assert next(answers) == b"here"
        probe.process.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    error = from_rpc_error(caught.value)
    assert (type(error), error.reason) == (Unavailable, "SERVER_LEAVING")
    assert probe.process.wait(timeout=60) == 0
