"""Who answers when all want to: so many at a time, the others in turn."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator

from services.finetune.errors import ResourceExhausted

MOST_RETRY_S = 60


class Turns:
    """At most `most` turns at a time, `each` of them by one caller, and `queue` more callers' turns waiting.

    Callers that wait are served in a round, one turn each, and the turns of one caller in their order. Of one event loop.
    """

    def __init__(self, most: int, each: int, queue: int) -> None:
        self._most, self._each, self._queue = most, each, queue
        self._running: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of the round
        self._taken_s = 1.0  # how long a turn lasts: a running mean

    @property
    def running(self) -> int:
        return self._running.total()

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def turn(self, who: str) -> AsyncIterator[None]:
        """Wait for a turn, and hold it. ResourceExhausted (QUEUE_FULL), with `retry_after_s` in its metadata."""
        await self._take(who)
        begun = time.monotonic()
        try:
            yield
        finally:
            self._taken_s += 0.1 * (time.monotonic() - begun - self._taken_s)
            self._give(who)

    async def _take(self, who: str) -> None:
        if self._may(who):
            self._running[who] += 1
            return
        line = self._waiting.setdefault(who, deque())
        if len(line) >= self._queue:
            wait_s = min(max(math.ceil(self._taken_s * len(line) / self._each), 1), MOST_RETRY_S)
            raise ResourceExhausted(
                f"{len(line)} requests of {who or 'this model'} wait already; ask again in {wait_s} s",
                reason="QUEUE_FULL",
                metadata={"retry_after_s": str(wait_s)},
            )
        mine = asyncio.get_running_loop().create_future()
        line.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.cancelled():
                self._leave(who, mine)
            else:
                self._give(who)  # the turn came just as its caller left
            raise

    def _may(self, who: str) -> bool:
        return self.running < self._most and self._running[who] < self._each

    def _leave(self, who: str, mine: asyncio.Future[None]) -> None:
        line = self._waiting.get(who)
        if line is not None and mine in line:
            line.remove(mine)
            if not line:
                del self._waiting[who]

    def _give(self, who: str) -> None:
        self._running[who] -= 1
        if not self._running[who]:
            del self._running[who]
        while (chosen := next((w for w in self._waiting if self._may(w)), None)) is not None:
            line = self._waiting.pop(chosen)
            next_one = line.popleft()
            if line:
                self._waiting[chosen] = line  # behind the others
            if not next_one.done():
                self._running[chosen] += 1
                next_one.set_result(None)
