"""Where an answer's text stops."""

from __future__ import annotations

from collections.abc import Sequence

from services.finetune.tokenizer import Tokenizer


class StopText:
    """Text as it comes, held back while it may still become a stop text."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], marks: Sequence[str] = ()) -> None:
        """`marks` are special tokens that shall be seen in the text."""
        self._stream = tokenizer.stream(marks)
        self._stops = [s for s in stops if s]
        self._held = ""
        self.stopped = False

    def push(self, ids: Sequence[int], last: bool) -> str:
        self._held += self._stream.push(ids, last)
        ends = [at for s in self._stops if (at := self._held.find(s)) >= 0]
        if ends:
            self.stopped = True
            return self._held[: min(ends)]
        keep = 0 if last else max((self._overlap(s) for s in self._stops), default=0)
        out = self._held[: len(self._held) - keep]
        self._held = self._held[len(out) :]
        return out

    def _overlap(self, stop: str) -> int:
        """How many of the last characters are the beginning of `stop`."""
        for n in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:n]):
                return n
        return 0
