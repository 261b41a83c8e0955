"""`quartet up`: services and gateway come and go together."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def up(folder: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "services.client", "up", "--port", "0", "--home", str(folder / "home"), *flags]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield process
        finally:
            process.kill()


def until_gone(address: str, seconds: float = 60) -> None:
    host, _, port = address.removeprefix("http://").rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except ConnectionRefusedError:
            return
        assert time.monotonic() < deadline, f"{address} still answers"
        time.sleep(0.1)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_gateway_answers_and_ends_with_the_services(tmp_path: Path, how: signal.Signals) -> None:
    with up(tmp_path, "--http-port", "0") as process:
        deadline = time.monotonic() + 120
        while not (found := re.search(r"web pages on (http://\S+?),", (tmp_path / "log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.1)
        address = found[1]
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as answer:
            assert b'"data":[]' in answer.read()
        process.send_signal(how)
        assert process.wait(timeout=60) == (0 if how is signal.SIGTERM else -signal.SIGKILL)
    until_gone(address)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_port_in_use_is_told_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with up(tmp_path, "--http-port", str(taken.getsockname()[1])) as process:
            assert process.wait(timeout=120) == 78
    log = (tmp_path / "log").read_text()
    assert "--http-port" in log and "serving" not in log and not (tmp_path / "home" / "quartet.db").exists()
