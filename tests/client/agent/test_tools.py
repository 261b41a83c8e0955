"""Search by an address of the user's, and tools of servers that speak MCP."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from services.client.agent import ToolError
from services.client.agent.servers import Servers
from services.client.agent.tools import Search, solver
from services.finetune.errors import FailedPrecondition, InvalidArgument

SERVER = Path(__file__).with_name("mcp_server.py")


class Web(BaseHTTPRequestHandler):
    """Answers by the path; `asked` are the paths and keys that it saw."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012  one server a test module

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("x-api-key", "")))
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("location", "/searx?q=elsewhere")
            self.end_headers()
            return
        bodies = {
            "/searx": json.dumps({"results": [{"title": "A", "url": "http://a", "content": "alpha"}, {"title": "B"}]}),
            "/serper": json.dumps({"organic": [{"title": "C", "link": "http://c", "snippet": "gamma"}]}),
            "/none": json.dumps({"results": []}),
            "/text": "plain words",
        }
        body = bodies.get(self.path.partition("?")[0])
        self.send_response(200 if body else 500)
        self.end_headers()
        self.wfile.write((body or "broken").encode())

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Web) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_search_asks_where_it_is_told_to(web: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("X-API-Key: secret\n")
    search = Search(f"{web}/serper", str(tmp_path / "key"))
    assert search.tool().call({"query": "what & why"}) == "C | gamma | http://c"
    assert Web.asked[-1] == ("/serper?q=what%20%26%20why", "secret")
    assert Search(f"{web}/searx?lang=en&text={{query}}").find("x") == "A | alpha | http://a\nB"
    assert Web.asked[-1][0] == "/searx?lang=en&text=x"
    assert Search(f"{web}/none").find("x") == "nothing was found"
    assert Search(f"{web}/text").find("x") == "plain words"


def test_a_search_that_fails_says_no_more_than_that(web: str) -> None:
    for path, why in (("broken?key=secret", "status 500"), ("away", "status 302")):
        with pytest.raises(ToolError, match=why) as caught:
            Search(f"{web}/{path}").find("x")
        assert "secret" not in str(caught.value)
    with pytest.raises(InvalidArgument):
        Search("file:///etc/passwd")
    with pytest.raises(ToolError, match="query must be a text"):
        Search(web).tool().call({"query": 3})
    with pytest.raises(ToolError, match="equations must be a list"):
        solver().call({"equations": 3})


def test_tools_of_a_command() -> None:
    with Servers([shlex.join([sys.executable, str(SERVER)])]) as servers:
        tools = {t.name: t for t in servers.tools}
        assert set(tools) == {"reverse", "fail_now"}
        assert tools["reverse"].description == "Turns a text around."
        assert tools["reverse"].parameters["required"] == ["text"]
        assert tools["reverse"].call({"text": "abc"}) == "cba"
        with pytest.raises(ToolError, match="no such luck"):
            tools["fail_now"].call({})
        with pytest.raises(ToolError):
            tools["reverse"].call({"text": 3, "more": 1})


@pytest.mark.slow
def test_tools_of_an_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, str(SERVER), str(port)], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        with Servers([f"http://127.0.0.1:{port}/mcp"]) as servers:
            assert next(t for t in servers.tools if t.name == "reverse").call({"text": "abc"}) == "cba"
        process.terminate()


@pytest.mark.parametrize("address", ["/no/such/command", f"{sys.executable} -c 0", "http://127.0.0.1:9/mcp"])
def test_a_server_that_is_none_is_named(address: str) -> None:
    with pytest.raises(FailedPrecondition) as caught, Servers([address]):
        pass
    assert caught.value.reason == "MCP_FAILED" and address.split()[0] in caught.value.message
