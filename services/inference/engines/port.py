"""What an engine must do. Token ids in, token ids out: templates, texts and stop texts are the engine server's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens; see the proto's Sampling. `eos_ids` end an answer and are not given out."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    repetition_penalty: float
    seed: int | None
    eos_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """New tokens. `finish` is "", "stop" or "length"; set on the last step."""

    ids: list[int]
    finish: str = ""


class Engine(Protocol):
    """A model with its adapters, answering several requests at a time."""

    context_length: int
    """Tokens that a prompt and its answer may have together."""
    vocabulary: int
    """Token ids are from 0 to below this."""

    def generate(self, ids: Sequence[int], sampling: Sampling, adapter: str) -> AsyncIterator[Step]:
        """Continue `ids`. Closing the iterator frees what the request holds. `adapter` is a loaded key, or "" for none."""

    def load(self, key: str, folder: Path) -> None:
        """Make an adapter in PEFT layout known as `key`, while others answer. Nothing in `folder` is needed afterwards.

        FailedPrecondition (MODEL_NOT_SERVABLE); then nothing changed.
        """

    def unload(self, key: str) -> None:
        """Forget a loaded adapter, which no answer uses."""

    def alive(self) -> bool:
        """Whether it can still answer; if not, nothing brings it back."""

    def close(self) -> None:
        """Free what it holds beside this process's own memory. Nothing is asked of it afterwards."""
