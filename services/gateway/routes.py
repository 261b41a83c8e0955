"""The HTTP routes: a request in, calls to the inference service, an answer or a stream of server-sent events out."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import Receive, Scope, Send

from services.common import auth, requests, tracing
from services.common.metrics import Metrics
from services.finetune.errors import Cancelled, InvalidArgument, NotFound, QuartetError, ResourceExhausted
from services.gateway import wire
from services.gateway.embeddings import read_embeddings
from services.gateway.errors import error_object, status_of
from services.gateway.images import Fetch, fetch_images
from services.gateway.reach import Reach
from services.gateway.tools import call_objects
from services.gateway.wire import Answer, Asked, Choice

log = logging.getLogger("quartet.gateway")

MAX_BODY_BYTES = 4 << 20

GONE_S = 0.5
"""Seconds between looks at whether a caller that waits for a whole answer is still there."""

_ESCAPED_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

T = TypeVar("T")


class Sends(Protocol):
    """What a route gives back: a Response, or what stands for one."""

    status_code: int

    @property
    def headers(self) -> MutableHeaders: ...

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


Handler = Callable[[Request], Awaitable[Sends]]


def application(
    reach: Reach,
    token: str,
    metrics: Metrics | None = None,
    pages: bool = False,
    leaving: Callable[[], bool] = lambda: False,
    fetch: Fetch | None = None,
    origins: Sequence[str] = (),
) -> Starlette:
    """The gateway in front of the services that are in `reach`; a `token`, if set, is the API key that all must show.

    Images at web addresses are brought by `fetch`, or refused. Scripts of pages from `origins` may call the API ("*": any);
    they show the key as everybody does, and no cookie counts. With `pages` the web pages too, which need the extra `web`;
    open ones let go once the server is `leaving`.
    """
    gateway = Gateway(reach, fetch)
    guarded = functools.partial(_guarded, token=token, metrics=metrics or Metrics())
    v1 = [
        Route("/models", guarded(gateway.models)),
        Route("/models/{model:path}", guarded(gateway.model)),
        Route("/chat/completions", guarded(gateway.chat), methods=["POST"]),
        Route("/completions", guarded(gateway.complete), methods=["POST"]),
        Route("/embeddings", guarded(gateway.embed), methods=["POST"]),
    ]
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=[requests.KEY, "retry-after"],
    )
    routes: list[BaseRoute] = [
        Route("/healthz", gateway.health),
        Mount("/v1", routes=v1, middleware=[cors] if origins else []),
    ]
    opening: list[Callable[[], AbstractAsyncContextManager[Any]]] = [reach.open]
    if pages:
        from services.gateway.pages.site import site

        seen = site(reach, token, leaving)
        routes.append(Mount("/", seen))
        opening.append(lambda: seen.router.lifespan_context(seen))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            for opened in opening:
                await held.enter_async_context(opened())
            yield

    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _no_route})


class Gateway:
    """What the routes do."""

    def __init__(self, reach: Reach, fetch: Fetch | None) -> None:
        self._reach, self._fetch = reach, fetch

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def models(self, request: Request) -> Response:
        served = await self._reach.inference.served()
        return JSONResponse({"object": "list", "data": [wire.model_object(s) for s in served]})

    async def model(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        for served in map(wire.model_object, await self._reach.inference.served()):
            if served["id"] == wanted:
                return JSONResponse(served)
        raise NotFound(f"the model {wanted!r} is not served; /v1/models lists what is", reason="ENDPOINT_NOT_FOUND")

    async def chat(self, request: Request) -> Sends:
        body = await _body(request)
        fetched = await fetch_images(body, self._fetch) if self._fetch is not None else {}
        asked = wire.read_chat(body, fetched)
        return await self._answer(request, asked, Answer(asked, chat=True), self._reach.chat)

    async def complete(self, request: Request) -> Sends:
        asked = wire.read_completion(await _body(request))
        return await self._answer(request, asked, Answer(asked, chat=False), self._reach.generate)

    async def embed(self, request: Request) -> Sends:
        asked = read_embeddings(await _body(request))
        inference, told = self._reach.inference, requests.along(request.state.number)
        parts = [inference.embed(part, told) for part in asked.requests(inference.parent)]
        done = await _unless_gone(request, asyncio.gather(*parts))
        return JSONResponse(asked.whole(done))

    async def _answer(
        self, request: Request, asked: Asked, answer: Answer, ask: Callable[[Any, str], AsyncIterator[Any]]
    ) -> Sends:
        choices = [ask(wanted, request.state.number) for wanted in asked.requests(self._reach.inference.parent)]
        if asked.stream:
            pieces = _merged(choices)
            # The first piece is waited for, so that what is wrong with the request still gets a status of its own.
            first = await anext(pieces)
            events = StreamingResponse(_events(asked, answer, first, pieces), media_type="text/event-stream")
            return _Closing(events, pieces)
        done = await _unless_gone(request, asyncio.gather(*(_collect(choice) for choice in choices)))
        prompt = sum(tokens for _, tokens in done[:: asked.n])
        return JSONResponse(answer.whole([choice for choice, _ in done], prompt))


class _Traced:
    """A response at whose end its span ends."""

    def __init__(self, response: Sends, span: tracing.Span) -> None:
        self._response, self._span = response, span
        self.status_code, self.headers = response.status_code, response.headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            self._span.tell(http__response__status_code=self.status_code)
            self._span.end(str(self.status_code) if self.status_code >= 500 else "")


class _Closing:
    """A stream whose source is closed however its sending ends: a caller may be gone before the first piece is taken, and a
    generator that never began closes nothing."""

    def __init__(self, response: Response, source: AsyncIterator[Any]) -> None:
        self._response = response
        self._source = source
        self.status_code = response.status_code

    @property
    def headers(self) -> MutableHeaders:
        return self._response.headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            await self._source.aclose()  # type: ignore[attr-defined]  # it is a generator


async def _unless_gone(request: Request, work: asyncio.Future[T]) -> T:
    """What `work` gives; if the caller hangs up first it is cancelled, and the engine is free again."""
    while not (await asyncio.wait({work}, timeout=GONE_S))[0]:
        if await request.is_disconnected():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work
            raise Cancelled("the caller hung up", reason="CALLER_GONE")
    return work.result()


async def _collect(choice: AsyncIterator[Any]) -> tuple[Choice, int]:
    """One answer, and the tokens of its prompt."""
    text, logprobs, last = "", [], None
    calls: list[Any] = []
    async for last in choice:
        text += last.text
        logprobs += last.logprobs
        calls += getattr(last, "tool_calls", ())  # only a chat's answers have them
    if last is None:
        raise EOFError("the answer ended before it began")
    made = Choice(text, wire.FINISH[last.finish_reason], last.usage.completion_tokens, logprobs, calls)
    return made, last.usage.prompt_tokens


async def _merged(choices: list[AsyncIterator[Any]]) -> AsyncIterator[tuple[int, Any]]:
    """(index, piece) of all answers as they come; closing it ends them all."""
    pieces: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def drain(index: int, choice: AsyncIterator[Any]) -> None:
        try:
            async for piece in choice:
                pieces.put_nowait((index, piece))
            pieces.put_nowait((index, None))
        except Exception as error:
            pieces.put_nowait((index, error))

    tasks = [asyncio.create_task(drain(n, choice)) for n, choice in enumerate(choices)]
    left = len(tasks)
    try:
        while left:
            index, piece = await pieces.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield index, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _events(asked: Asked, answer: Answer, first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[str]:
    """The stream as server-sent events. An error in it is its last event: the status has gone out already."""
    begun: set[int] = set()
    called: Counter[int] = Counter()
    prompt = completion = 0
    try:
        async with aclosing(_joined(first, rest)) as pieces:  # type: ignore[type-var]  # it is a generator
            async for index, piece in pieces:
                finish = wire.FINISH.get(piece.finish_reason)
                calls = call_objects(getattr(piece, "tool_calls", ()), called[index])
                if piece.text or piece.logprobs or calls or index not in begun:
                    text = None if calls and not piece.text else piece.text
                    yield _event(answer.chunk(index, text, None, index not in begun, piece.logprobs, calls))
                    begun.add(index)
                    called[index] += len(calls)
                if finish:
                    prompt += 0 if index % asked.n else piece.usage.prompt_tokens
                    completion += piece.usage.completion_tokens
                    yield _event(answer.chunk(index, None, finish))
        if asked.usage:
            yield _event(answer.counts(prompt, completion))
    except QuartetError as error:
        yield _event(error_object(error))
        return
    yield "data: [DONE]\n\n"


async def _joined(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    try:
        yield first
        async for piece in rest:
            yield piece
    finally:
        await rest.aclose()  # type: ignore[attr-defined]  # it is a generator


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _body(request: Request) -> Any:
    """The JSON of a body. InvalidArgument (BODY_MALFORMED), ResourceExhausted (BODY_TOO_LARGE)."""
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > MAX_BODY_BYTES:
            raise ResourceExhausted("a body may have 4 MiB; shorten the conversation", reason="BODY_TOO_LARGE")
    try:
        # Strictly: json would let half of a surrogate pair through, and no text of ours can hold one.
        body = json.loads(data.decode())
        if _ESCAPED_SURROGATE.search(data):
            json.dumps(body, ensure_ascii=False).encode()
        return body
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"the body is no JSON: {str(error)[:200]}", reason="BODY_MALFORMED") from error


def _guarded(handler: Handler, token: str, metrics: Metrics) -> Handler:
    """`handler` behind the API key, with errors in OpenAI's shape, and an id for every request that is logged and passed on.

    What is measured ends where an answer's stream begins.
    """

    async def guarded(request: Request) -> Sends:
        begun = time.perf_counter()
        number = request.state.number = requests.given_or_made(request.headers.get(requests.KEY, ""))
        span = _span(request, number)
        try:
            if token:
                auth.check(token, [("authorization", request.headers.get("authorization", ""))])
            response: Sends = await handler(request)
        except QuartetError as error:
            response = _told(error)
        except Exception as error:
            log.error("request %s", number, exc_info=error)
            body = {"message": f"a defect of this server; its log tells more under {number}", "type": "server_error"}
            response = JSONResponse({"error": {**body, "param": None, "code": "internal"}}, 500)
        response.headers[requests.KEY] = number
        took = time.perf_counter() - begun
        metrics.ended(f"/openai/{handler.__name__}", str(response.status_code), took)
        log.info(
            "request %s: %s %s %d after %.3f s", number, request.method, request.url.path, response.status_code, took
        )
        return _Traced(response, span)

    return guarded


def _span(request: Request, number: str) -> tracing.Span:
    route = "/v1" + request.scope["route"].path
    return tracing.begin(
        f"{request.method} {route}",
        request.headers.items(),
        http__request__method=request.method,
        http__route=route,
        quartet__request_id=number,
    )


def _told(error: QuartetError) -> Response:
    wait = error.metadata.get("retry_after_s")
    return JSONResponse(error_object(error), status_of(error), {"retry-after": wait} if wait else None)


async def _no_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    told = f"there is no {request.method} {request.url.path} here"
    body = {"message": told, "type": "invalid_request_error", "param": None, "code": "unknown_url"}
    return JSONResponse({"error": body}, status)
