"""What an engine must do. Token ids in, token ids out: templates, texts and stop texts are the engine server's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from services.finetune.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer must be: `text` is a JSON schema, a regular expression or a grammar, by `kind`."""

    kind: Literal["json_schema", "regex", "grammar"]
    text: str


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
    logprobs: int | None = None
    form: Form | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Likely:
    """Of a token of an answer: its logarithmic probability, and the likeliest (id, logarithmic probability) in its place."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Step:
    """New tokens. `finish` is "", "stop" or "length"; set on the last step. `likely` is as long as `ids` if asked for."""

    ids: list[int]
    finish: str = ""
    likely: list[Likely] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file that was found to decode: its bytes, and their sha256 in hexadecimal digits."""

    digest: str
    data: bytes


class Engine(Protocol):
    """A model with its adapters, answering several requests at a time."""

    context_length: int
    """Tokens that a prompt and its answer may have together."""
    most_adapters: int
    """Adapters that it holds at a time, more than `most_answers`; beyond them those used longest ago are unloaded."""
    most_answers: int
    """Requests that it takes at a time; what more it could hold would only cost memory."""
    vocabulary: int
    """Token ids are from 0 to below this."""

    def generate(
        self, ids: Sequence[int], sampling: Sampling, adapter: str, images: Sequence[Picture] = ()
    ) -> AsyncIterator[Step]:
        """Continue `ids`, among which each of `images` has all its tokens, in order. Closing the iterator frees what the
        request holds. `adapter` is a loaded key, or "" for none."""

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        """A vector for each text. FailedPrecondition (EMBEDDINGS_UNSUPPORTED) of what is no encoder."""

    def load(self, key: str, folder: Path) -> None:
        """Make an adapter in PEFT layout known as `key`, while others answer. Nothing in `folder` is needed afterwards.

        FailedPrecondition (MODEL_NOT_SERVABLE); then nothing changed.
        """

    def unload(self, key: str) -> None:
        """Forget a loaded adapter, which no answer uses."""

    def cache_use(self) -> float:
        """The part, 0 to 1, in use of the memory set aside for keys and values; NaN where none is set aside."""

    def alive(self) -> bool:
        """Whether it can still answer; if not, nothing brings it back."""

    def close(self) -> None:
        """Free what it holds beside this process's own memory. Nothing is asked of it afterwards."""


def no_embeddings() -> FailedPrecondition:
    """Of every other engine: states of a model that was made to go on with texts tell little of what they mean."""
    return FailedPrecondition(
        "this model was made to answer, not to embed: serve an encoder (a sentence-transformers model) for embeddings",
        reason="EMBEDDINGS_UNSUPPORTED",
    )
