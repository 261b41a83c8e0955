"""A real datasets service in a process of its own, on a unix socket."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.common.status import CHANNEL_OPTIONS


class Service:
    """`python -m services.datasets`; it can be killed and started again on the same home."""

    def __init__(self, home: Path, *flags: str) -> None:
        self.home = home
        self.flags = flags
        self.address = f"unix:{home}/s"

    def start(self) -> Service:
        file = self.home / "address"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "services.datasets", "--home", str(self.home), "--host", self.address]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--address-file", str(file), *self.flags], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while not file.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.home / "log").read_text())
            time.sleep(0.01)
        self.channel = grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        self.stub = DatasetsStub(self.channel)
        return self

    def kill(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.channel.close()
        self.process.terminate()
        return self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(tmp_path_factory.mktemp("h")).start()
    yield running
    assert running.stop() == 0
    assert "Traceback" not in (running.home / "log").read_text()


@pytest.fixture()
def datasets(service: Service) -> DatasetsStub:
    return service.stub
