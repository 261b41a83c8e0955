"""Images through OpenAI's API, and what is fetched for them: addresses of the inside never."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import InvalidArgument, PermissionDenied, QuartetError
from services.gateway import fetching
from services.gateway.fetching import check_url, fetch, is_public
from services.gateway.images import fetch_images
from services.gateway.wire import read_chat

PNG = b"\x89PNG not really"
DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()


def body(*urls: Any, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url, **more}} for url in urls]
    return {"model": "e", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]}


def test_data_urls_become_bytes() -> None:
    (request,) = read_chat(body(DATA, detail="high")).requests("workspaces/w")
    assert isinstance(request, pb.ChatRequest)
    image, text = request.messages[0].content
    assert image.image.data == PNG and text.text == "What?"


@pytest.mark.parametrize(
    ("given", "param", "reason"),
    [
        (body(DATA, detail="low"), "messages[0].content[0].image_url.detail", "FIELD_UNSUPPORTED"),
        (body("https://example.com/a.png"), "messages[0].content[0].image_url.url", "FIELD_UNSUPPORTED"),
        (body("file:///etc/passwd"), "messages[0].content[0].image_url.url", "FIELD_UNSUPPORTED"),
        (body("data:image/png;base64,???"), "messages[0].content[0].image_url.url", "FIELD_INVALID"),
        (body("data:text/html,<b>"), "messages[0].content[0].image_url.url", "FIELD_INVALID"),
        (body(7), "messages[0].content[0].image_url", "FIELD_INVALID"),
    ],
)
def test_other_urls_are_refused(given: Any, param: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        read_chat(given)
    assert (error.value.violations[0].field, error.value.reason) == (param, reason)


def test_addresses_are_fetched_once_where_that_is_allowed() -> None:
    asked: list[str] = []

    async def fetch(url: str) -> bytes:
        asked.append(url)
        return PNG

    given = body("https://a.example/1.png", DATA, "https://a.example/1.png")
    (request,) = read_chat(given, asyncio.run(fetch_images(given, fetch))).requests("workspaces/w")
    assert isinstance(request, pb.ChatRequest)
    assert asked == ["https://a.example/1.png"] and [p.image.data for p in request.messages[0].content[:3]] == [PNG] * 3
    with pytest.raises(InvalidArgument, match="9 addresses"):
        asyncio.run(fetch_images(body(*(f"https://a.example/{n}" for n in range(9))), fetch))
    for odd in (None, {"messages": 3}, {"messages": [{"content": [{"image_url": 3}, 7]}, 7]}):
        assert asyncio.run(fetch_images(odd, fetch)) == {}


INSIDE = ["127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
          "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
          "fe80::1", "fc00::1", "fd00:ec2::254", "ff02::1", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::",
          "2001:0:7f00:1::", "2001:db8::1"]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_no_inner_address_is_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_others_are(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "http://[::1]/", "http://0.0.0.0/", "http://169.254.169.254/latest/meta-data/",
        "http://2130706433/", "http://0x7f000001/", "http://0177.0.0.1/", "http://127.1/", "http://localhost/",
        "http://[::ffff:127.0.0.1]/",
    ],
)  # fmt: skip
def test_however_they_are_written(url: str) -> None:
    with pytest.raises(PermissionDenied) as error:
        asyncio.run(fetch(url))
    assert error.value.reason == "URL_FORBIDDEN"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "gopher://a.example/", "ftp://a.example/", "//a.example/", "http:///x", "http://",
        "http://a.example\\@127.0.0.1/", "http://a.example/\\x", "http://user@a.example/", "http://u:p@a.example/",
        "http://a.example:8080/", "http://a.example:bad/", "http://a example/", "http://ä.example/", "http://a.example/\n",
        "http://[::1/", "http://a.example/" + "x" * 3000,
    ],
)  # fmt: skip
def test_what_two_parsers_may_read_otherwise_is_no_address(url: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        check_url(url)
    assert error.value.reason == "URL_MALFORMED"


@contextmanager
def server(answer: Callable[[socket.socket, int], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A web server that all names but "inside" lead to; what hosts it was asked for. `answer` gets a connection and its
    number."""
    made = socket.create_server(("127.0.0.1", 0))
    hosts: list[str] = []

    def serve() -> None:
        number = 0
        while True:
            try:
                line, _ = made.accept()
            except OSError:
                return
            with line:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += line.recv(4096)
                hosts.append(head.split(b"Host: ")[1].split(b"\r\n")[0].decode())
                with suppress(OSError):
                    answer(line, number)
            number += 1

    names: dict[str, list[str]] = {"inside": ["10.0.0.1"], "mixed": ["1.1.1.1", "127.0.0.1"]}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, port, **_: [(0, 0, 0, "", (a, port)) for a in names.get(host, ["1.1.1.1"])]
    )

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        line = socket.socket()
        line.connect(made.getsockname())
        return line

    monkeypatch.setattr(socket, "create_connection", connect)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield hosts
    made.close()


def says(text: bytes) -> Callable[[socket.socket, int], None]:
    return lambda line, _: line.sendall(text)


def test_a_file_comes_from_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with server(says(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nPNG"), monkeypatch) as hosts:
        assert asyncio.run(fetch("http://a.example/1.png?x=1")) == b"PNG"
    assert hosts == ["a.example"]


def redirect(to: str) -> Callable[[socket.socket, int], None]:
    return says(f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode())


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("http://inside/", "URL_FORBIDDEN"),
        ("http://mixed/", "URL_FORBIDDEN"),
        ("file:///etc/passwd", "URL_MALFORMED"),
        ("http://a.example:22/", "URL_MALFORMED"),
        ("/again", "URL_UNREACHABLE"),
    ],
)
def test_redirects_are_addresses_as_any(monkeypatch: pytest.MonkeyPatch, to: str, reason: str) -> None:
    with server(redirect(to), monkeypatch) as hosts, pytest.raises(QuartetError) as error:
        asyncio.run(fetch("http://a.example/"))
    assert error.value.reason == reason and len(hosts) == (4 if to == "/again" else 1)


def drip(line: socket.socket, _: int) -> None:
    line.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(2000):
        line.sendall(b"x")
        time.sleep(0.01)


def pour(line: socket.socket, _: int) -> None:
    line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    while True:
        line.sendall(b"x" * 65536)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (drip, "URL_UNREACHABLE"),
        (pour, "IMAGE_TOO_LARGE"),
        (says(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"), "URL_UNREACHABLE"),
        (says(b"what is this"), "URL_UNREACHABLE"),
        (says(b""), "URL_UNREACHABLE"),
    ],
)
def test_what_is_slow_large_or_no_web_server_is_left(monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str) -> None:
    monkeypatch.setattr(fetching, "DEADLINE_S", 1.0 if answer is drip else 60.0)
    with server(answer, monkeypatch), pytest.raises(InvalidArgument) as error:
        asyncio.run(fetch("http://a.example/"))
    assert error.value.reason == reason, error.value.message
