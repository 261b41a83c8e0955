"""Who may see the pages: whoever showed the API key, for as long as a signed cookie lasts.

Without a key the gateway listens on loopback only; then a page of another site must not reach it through the browser.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.settings import Settings

COOKIE = "quartet_session"
LASTS_S = 7 * 86_400
LOOK_S = 1.0
MAX_FORM_BYTES = 4096
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; frame-ancestors 'none'; "
    "form-action 'self'; base-uri 'self'"
)
"""Nothing is fetched from elsewhere, whatever a model writes into its answer. Gradio's pages need the exceptions."""
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "same-origin"}
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Quartet</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark }
body { font: 16px system-ui, sans-serif; display: grid; place-items: center; min-height: 90vh; margin: 0 }
form { display: grid; gap: .8rem; width: min(22rem, 90vw) }
input, button { font: inherit; padding: .6rem; border-radius: .4rem; border: 1px solid #8888 }
button { background: #4338ca; color: white; cursor: pointer }
[role=alert] { color: #dc2626; margin: 0 }
</style>
<form method="post"><h1>Quartet</h1><label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<!-- told -->
<button>Log in</button></form></html>"""

WRONG = """<p role="alert">This is not the API key of this gateway. The key is what its --token-file holds.</p>"""


class Gate:
    """Before the pages, as ASGI middleware. `token` is the API key; without one all may pass that are of this machine.

    Once it is `leaving`, the streams that an open page keeps are ended: they would hold the gateway back.
    """

    def __init__(self, app: ASGIApp, token: str, leaving: Callable[[], bool] = lambda: False) -> None:
        self._app = app
        self._token = token
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the pages use no WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        request = Request(scope, receive)
        answer = self._foreign(request) or await self._entrance(request)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        async def heard() -> Message:
            hearing = asyncio.ensure_future(receive())
            try:
                while not (await asyncio.wait({hearing}, timeout=LOOK_S))[0]:
                    if self._leaving():
                        return {"type": "http.disconnect"}
                return hearing.result()
            finally:
                hearing.cancel()

        await (answer or self._app)(scope, heard, guarded)

    def _foreign(self, request: Request) -> Response | None:
        """A refusal, where a page of another site asks."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
        name = urlsplit(f"//{host}").hostname or ""
        if not self._token and not Settings(host=name).loopback:
            return PlainTextResponse("without an API key these pages answer on this machine's own address only", 403)
        if origin and request.method not in ("GET", "HEAD") and urlsplit(origin).netloc != host:
            return PlainTextResponse(f"a page of {origin} may not ask here", 403)
        return None

    async def _entrance(self, request: Request) -> Response | None:
        """What somebody without a session gets; None lets them in."""
        if not self._token:
            return None
        if request.url.path == "/logout":
            left: Response = RedirectResponse("/login", 303)
            left.delete_cookie(COOKIE)
            return left
        if request.url.path == "/login":
            return await self._login(request) if request.method == "POST" else HTMLResponse(PAGE)
        if self._knows(request.cookies.get(COOKIE, "")):
            return None
        if "text/html" in request.headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return PlainTextResponse("log in first, at /login", 401)

    async def _login(self, request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FORM_BYTES:
                return PlainTextResponse("a key is shorter", 413)
        shown = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0]
        if not hmac.compare_digest(shown.strip().encode(), self._token.encode()):
            return HTMLResponse(PAGE.replace("<!-- told -->", WRONG), 401)
        passed = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        cookie = self._signed(int(time.time()) + LASTS_S)
        passed.set_cookie(COOKIE, cookie, max_age=LASTS_S, httponly=True, samesite="lax", secure=secure)
        return passed

    def _signed(self, until: int) -> str:
        said = f"session {until}".encode()
        return f"{until}.{hmac.new(self._token.encode(), said, hashlib.sha256).hexdigest()}"

    def _knows(self, cookie: str) -> bool:
        until = cookie.partition(".")[0]
        alive = until.isascii() and until.isdecimal() and len(until) < 12 and int(until) > time.time()
        return alive and hmac.compare_digest(cookie, self._signed(int(until)))
