"""Tools of the user's own, by the Model Context Protocol: a command that speaks it, or an http address."""

from __future__ import annotations

import asyncio
import re
import shlex
import threading
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Self

from services.client.agent import Tool, ToolError
from services.finetune.errors import FailedPrecondition

START_S = 60.0
CALL_S = 120.0


class Servers:
    """The tools of several servers, for as long as this is entered. Their calls are plain functions: a loop in a thread
    of its own speaks with the servers."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True)
        self._ended = asyncio.Event()
        self.tools: list[Tool] = []

    def __enter__(self) -> Self:
        """FailedPrecondition (MCP_FAILED)."""
        self._thread.start()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._life = asyncio.run_coroutine_threadsafe(self._live(ready), self._loop)

        async def until_ready() -> None:
            await ready

        try:
            asyncio.run_coroutine_threadsafe(until_ready(), self._loop).result()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._life.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _live(self, ready: asyncio.Future[None]) -> None:
        """Connections are opened and closed by one task, as their library demands."""
        address = ""
        try:
            async with AsyncExitStack() as stack:
                for address in self._addresses:
                    async with asyncio.timeout(START_S):
                        client = await stack.enter_async_context(_client(address))
                        await self._add(client)
                ready.set_result(None)
                await self._ended.wait()
        except Exception as error:
            if ready.done():
                return  # a server that ends badly at the end
            failed = error if isinstance(error, FailedPrecondition) else _failed(address, error)
            failed.__cause__ = None if failed is error else error
            ready.set_exception(failed)

    async def _add(self, client: Any) -> None:
        cursor: str | None = None
        while True:
            listed = await client.list_tools(cursor=cursor)
            for tool in listed.tools:
                # Names of other servers' tools may have signs that models' templates do not take.
                name = re.sub(r"[^A-Za-z0-9_.-]", "_", tool.name)[:64]
                self.tools.append(
                    Tool(name, tool.description or "", tool.input_schema, self._caller(client, tool.name))
                )
            cursor = listed.next_cursor
            if not cursor:
                return

    def _caller(self, client: Any, name: str) -> Any:
        def call(arguments: Mapping[str, Any]) -> str:
            done = client.call_tool(name, dict(arguments), read_timeout_seconds=CALL_S)
            try:
                result = asyncio.run_coroutine_threadsafe(done, self._loop).result()
            except Exception as error:  # the library's own, of transport and protocol
                raise ToolError(f"{name} failed: {_reason(error)}") from error
            text = "\n".join(part.text for part in result.content if part.type == "text")
            if result.is_error:
                raise ToolError(text or f"{name} failed")
            return text

        return call


def _client(address: str) -> Any:
    try:
        from mcp import Client, StdioServerParameters
    except ImportError as error:
        raise FailedPrecondition(
            "tools over MCP need the library mcp: pip install 'quartet[agent]'", reason="MCP_FAILED"
        ) from error
    if re.match("https?://", address):
        return Client(address)
    command, *words = shlex.split(address)
    return Client(StdioServerParameters(command=command, args=words))


def _failed(address: str, error: Exception) -> FailedPrecondition:
    return FailedPrecondition(f"no tools from {address[:200]}: {_reason(error)}", reason="MCP_FAILED")


def _reason(error: BaseException) -> str:
    """The first of what a group of tasks failed of."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
