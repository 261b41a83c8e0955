"""An engine whose answers never end, which tells how many it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from services.inference.engines.port import Picture, Sampling, Step


class Endless:
    """See Engine. `going` answers are under way."""

    context_length = 1 << 20
    vocabulary = 259
    most_adapters = 8

    def __init__(self, most_answers: int) -> None:
        self.most_answers = most_answers
        self.going = 0
        self.begun = 0

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, adapter: str, images: Sequence[Picture] = ()
    ) -> AsyncIterator[Step]:
        self.going, self.begun = self.going + 1, self.begun + 1
        try:
            for n in range(sampling.max_tokens):
                yield Step([70 + n % 20], "length" if n + 1 == sampling.max_tokens else "")
                await asyncio.sleep(0.01)
        finally:
            self.going -= 1

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        raise NotImplementedError

    def load(self, key: str, folder: Path) -> None:
        raise NotImplementedError

    def unload(self, key: str) -> None:
        raise NotImplementedError

    def cache_use(self) -> float:
        return 0.0

    def alive(self) -> bool:
        return True

    def close(self) -> None:
        pass
