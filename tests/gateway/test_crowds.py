"""Ten thousand connections: the gateway and the engine server go on answering, and their memory stays within bounds."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from tests.inference.wire import turns

CROWD = 10_000
MOST_GROWTH_KIB = 400 << 10
"""40 KiB a connection: buffers of the transport and the objects that stand for it."""

SERVE = """
import sys, threading
from pathlib import Path
from tests.gateway.web import gateway
from tests.inference.endless import Endless
from tests.inference.engines.serving import engine_server
home = Path(sys.argv[1])
with engine_server(home, "", Endless(8)), gateway(f"unix:{home}/s") as port:
    (home / "port").write_text(str(port))
    sys.stdin.read()
"""


class Served:
    """Both servers in a process of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with (home / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, str(home)], stdin=subprocess.PIPE, stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while not (home / "port").exists() or not (home / "port").read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.1)
        self.port = int((home / "port").read_text())

    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def says_by_http(self) -> str:
        body = json.dumps({"model": "e", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3})
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v1/chat/completions", body.encode())
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"])

    def says_by_grpc(self) -> str:
        with grpc.insecure_channel(f"unix:{self.home}/s") as channel:
            request = pb.ChatRequest(messages=turns("hi"), sampling=pb.Sampling(max_tokens=3))
            return "".join(a.text for a in InferenceStub(channel).Chat(request, timeout=120))


@pytest.fixture()
def served(tmp_path: Path) -> Iterator[Served]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < CROWD + 1000:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    made = Served(tmp_path)
    yield made
    assert made.process.stdin is not None
    made.process.stdin.close()
    made.process.wait(60)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def crowd(family: socket.AddressFamily, address: object, first: bytes) -> list[socket.socket]:
    found = []
    deadline = time.monotonic() + 120
    for _ in range(CROWD):
        one = socket.socket(family)
        found.append(one)
        one.settimeout(120)
        while True:
            try:
                one.connect(address)  # type: ignore[arg-type]  # of either family
                break
            except BlockingIOError:  # a unix socket whose queue is full lets nobody wait in it
                assert time.monotonic() < deadline
                time.sleep(0.01)
        one.sendall(first)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("by", ["http", "grpc"])
def test_ten_thousand_connections(served: Served, by: str) -> None:
    assert served.says_by_http() == served.says_by_grpc() != ""
    before, files = served.memory_kib(), served.files()
    if by == "http":
        # Half a request each: none of them can be answered, and all are held.
        held = crowd(socket.AF_INET, ("127.0.0.1", served.port), b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")
    else:
        held = crowd(socket.AF_UNIX, f"{served.home}/s", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    with contextlib.ExitStack() as stack:
        for one in held:
            stack.enter_context(one)
        deadline = time.monotonic() + 120
        while served.files() < files + CROWD * 0.99 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert served.says_by_http() == served.says_by_grpc() != ""
        grown = served.memory_kib() - before
        assert grown < MOST_GROWTH_KIB, f"{grown / CROWD:.0f} KiB a connection"
    deadline = time.monotonic() + 120
    while served.files() > files + 100 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert served.files() <= files + 100, "connections that are gone are still held"
    assert served.says_by_http() == served.says_by_grpc() != ""
    print(f"{by}: {grown / CROWD:.1f} KiB a connection")
