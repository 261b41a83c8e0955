"""Turns: limits, the round of callers, a full queue, and who leaves while waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from services.finetune.errors import ResourceExhausted
from services.inference.turns import Turns


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


class Callers:
    """Turns that are held until they are let go, in the order in which they came."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.came: list[str] = []
        self.going: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def call(self, *names: str) -> None:
        """`names` such as a1: the first letter is the caller."""
        for name in names:
            self.going[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._hold(name))
            await self.settle()

    async def _hold(self, name: str) -> None:
        async with self.turns.turn(name[0]):
            self.came.append(name)
            await self.going[name].wait()

    async def end(self, *names: str) -> None:
        for name in names:
            self.going[name].set()
            await self.tasks[name]
            await self.settle()

    async def leave(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.gather(self.tasks[name], return_exceptions=True)
        await self.settle()

    @staticmethod
    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)


def test_callers_take_turns() -> None:
    async def work() -> None:
        c = Callers(Turns(most=1, each=1, queue=9))
        await c.call("a1", "a2", "a3", "a4", "b1", "c1", "b2")
        assert c.came == ["a1"] and c.turns.waiting == 6
        for n in range(7):
            await c.end(c.came[n])
        assert c.came == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]
        assert (c.turns.running, c.turns.waiting) == (0, 0)

    run(work())


def test_a_caller_without_a_name_is_one_too() -> None:
    async def work() -> None:
        limits = Turns(most=1, each=1, queue=9)
        async with limits.turn(""):
            second = asyncio.create_task(limits.turn("").__aenter__())
            await Callers.settle()
            assert limits.waiting == 1
        await second

    run(work())


def test_nobody_has_more_than_each() -> None:
    async def work() -> None:
        c = Callers(Turns(most=3, each=2, queue=9))
        await c.call("a1", "a2", "a3", "b1", "b2", "c1")
        assert c.came == ["a1", "a2", "b1"]
        await c.end("b1")  # a3 waits longest, but a has its two
        assert c.came[3:] == ["b2"]
        await c.end("a1")
        assert c.came[4:] == ["c1"] or c.came[4:] == ["a3"]
        await c.end("a2")
        assert set(c.came[4:]) == {"a3", "c1"}

    run(work())


def test_a_full_queue_says_how_long_to_wait() -> None:
    async def work() -> None:
        c = Callers(Turns(most=9, each=1, queue=2))
        await c.call("a1", "a2", "a3")
        with pytest.raises(ResourceExhausted) as caught:
            async with c.turns.turn("a"):
                pass
        assert caught.value.reason == "QUEUE_FULL"
        assert 1 <= int(caught.value.metadata["retry_after_s"]) <= 60
        await c.call("b1")  # others are not held up
        assert c.came == ["a1", "b1"]

    run(work())


def test_who_leaves_holds_nobody_up() -> None:
    async def work() -> None:
        c = Callers(Turns(most=1, each=1, queue=9))
        await c.call("a1", "a2", "a3", "b1")
        await c.leave("a2")
        await c.leave("b1")
        assert c.turns.waiting == 1
        await c.leave("a1")
        assert c.came == ["a1", "a3"]
        # The turn comes and its caller leaves in one and the same step.
        await c.call("b2", "c1")
        c.going["a3"].set()
        await asyncio.sleep(0)
        await c.leave("b2")
        await c.settle()
        assert c.came[2:] in (["c1"], ["b2", "c1"])
        await c.end("c1")
        assert (c.turns.running, c.turns.waiting) == (0, 0)

    run(work())
