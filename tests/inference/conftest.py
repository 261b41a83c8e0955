"""A real inference service in a process of its own, on a unix socket, with a tiny model to serve."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.common.status import CHANNEL_OPTIONS
from services.finetune.store import Store, open_store
from tests.inference import published

READY, STARTING, FAILED = pb.Endpoint.READY, pb.Endpoint.STARTING, pb.Endpoint.FAILED


class Service:
    """`python -m services.inference`; it can be killed and started again on the same home."""

    def __init__(self, home: Path, *flags: str) -> None:
        self.home = home
        self.flags = flags
        self.address = f"unix:{home}/s"
        self.store = open_store((home / "store").as_uri())

    def start(self) -> Service:
        file = self.home / "address"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "services.inference", "--home", str(self.home), "--host", self.address]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--address-file", str(file), *self.flags],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 30
        while not file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.home / "log").read_text())
            time.sleep(0.01)
        self.channel = grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self.stub = InferenceStub(self.channel)
        return self

    def kill(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.channel.close()
        self.process.terminate()
        return self.process.wait(timeout=30)

    def engines(self) -> list[int]:
        """Pids of engine servers that work on this service's store."""
        found = []
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = line.read_bytes().split(b"\0")
            except OSError:
                continue
            if b"services.inference.engines" in words and any(w.startswith(self.store.uri.encode()) for w in words):
                found.append(int(line.parent.name))
        return found

    def wait_for(self, name: str, state: pb.Endpoint.State.ValueType, seconds: float = 60) -> pb.Endpoint:
        """The endpoint once it is in a state."""
        found: list[pb.Endpoint] = []

        def arrived() -> bool:
            found[:] = [self.stub.GetEndpoint(pb.GetEndpointRequest(name=name))]
            return found[0].state == state

        until(arrived, seconds, lambda: f"{found[0]} {self.logs()}")
        return found[0]

    def logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()}" for p in [self.home / "log", *self.home.glob("logs/*")])


def until(done: Callable[[], bool], seconds: float = 15, tell: Callable[[], str] = str) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, tell()
        time.sleep(0.05)


@dataclass(frozen=True)
class Models:
    """Digests of what was published under these names."""

    tiny: str
    one: str
    other: str


def publish(store: Store, root: Path) -> Models:
    base, one, two = published.folders(root)
    tiny = published.model(store, base, "tiny")
    other = published.model(store, base, "other", context_length=511)
    broken = root / "broken"
    broken.mkdir()
    for file in published.TOKENIZER_FILES:
        (broken / file).write_bytes((base / file).read_bytes())
    (broken / "config.json").write_text('{"model_type": "no-such-model"}')
    published.model(store, broken, "broken")
    first = published.adapter(store, one, "one", tiny, system="Be brief.")
    published.adapter(store, two, "two", other)
    published.adapter(store, two, "untold", tiny, template="")
    return Models(tiny, first, other)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("h"))
    running.start()
    yield running
    assert running.stop() == 0, running.logs()
    until(lambda: not running.engines())
    assert "Traceback" not in running.logs()


@pytest.fixture(scope="module")
def models(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Models:
    return publish(service.store, tmp_path_factory.mktemp("models"))
