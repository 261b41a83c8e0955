"""The gate before the pages: keys, sessions, pages of other sites."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from services.gateway.pages.login import COOKIE, Gate

KEY = "a-key-that-is-long-enough"
HTML = {"accept": "text/html"}


async def _seen(request: Request) -> Response:
    return PlainTextResponse("a page")


def visitor(token: str = KEY, url: str = "http://127.0.0.1:8000") -> TestClient:
    routes = [Route("/{any:path}", _seen, methods=["GET", "POST"])]
    return TestClient(Starlette(routes=routes, middleware=[Middleware(Gate, token)]), url, follow_redirects=False)


def test_a_stranger_is_sent_to_the_login_and_a_program_is_refused() -> None:
    client = visitor()
    sent = client.get("/jobs", headers=HTML)
    assert (sent.status_code, sent.headers["location"]) == (303, "/login")
    assert client.post("/gradio_api/queue/join").status_code == 401
    assert "API key" in client.get("/login").text


def test_the_key_opens_and_logout_closes() -> None:
    client = visitor()
    passed = client.post("/login", data={"key": f" {KEY} "})
    assert (passed.status_code, passed.headers["location"]) == (303, "/")
    assert all(word in passed.headers["set-cookie"] for word in ("HttpOnly", "SameSite=lax"))
    assert client.get("/").text == "a page"
    assert client.get("/logout").status_code == 303
    assert client.get("/").status_code == 401


@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], "ключ"])
def test_a_wrong_key_is_told_and_opens_nothing(key: str) -> None:
    client = visitor()
    refused = client.post("/login", data={"key": key})
    assert refused.status_code == 401 and 'role="alert"' in refused.text and "not the API key" in refused.text
    assert "set-cookie" not in refused.headers


def test_a_long_form_is_cut_short() -> None:
    assert visitor().post("/login", content=b"key=" + b"x" * 10_000).status_code == 413


def test_sessions_are_signed_and_end() -> None:
    gate = Gate(Starlette(), KEY)
    soon = gate._signed(int(time.time()) + 60)
    assert gate._knows(soon)
    assert not gate._knows(gate._signed(int(time.time()) - 1))
    assert not Gate(Starlette(), KEY + "x")._knows(soon)
    until, _, sign = soon.partition(".")
    assert not gate._knows(f"{int(until) + 1}.{sign}")


@given(st.text(max_size=80))
def test_no_other_cookie_is_a_session(cookie: str) -> None:
    assert not Gate(Starlette(), KEY)._knows(cookie)


def test_pages_of_other_sites_are_refused() -> None:
    client = visitor("")
    assert client.post("/x", headers={"origin": "http://127.0.0.1:8000"}).text == "a page"
    refused = client.post("/x", headers={"origin": "https://evil.example"})
    assert refused.status_code == 403 and "evil.example" in refused.text
    # A name of theirs that leads here: DNS rebinding.
    assert visitor("", "http://evil.example").get("/").status_code == 403
    assert visitor(KEY, "http://quartet.example").get("/login").status_code == 200


def test_nothing_may_be_fetched_from_elsewhere() -> None:
    client = visitor("")
    for path in ("/", "/login"):
        assert "default-src 'self'" in client.get(path).headers["content-security-policy"]
    assert COOKIE not in client.cookies
