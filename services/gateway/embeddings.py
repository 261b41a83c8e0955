"""OpenAI's embeddings on our wire."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import nearest
from services.gateway.errors import bad, read_model

FIELDS = ("model", "input", "encoding_format", "dimensions", "user")
MOST_INPUTS = 2048
PART = 256
"""Inputs of one request to an engine server."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A body of /v1/embeddings, read."""

    model: str
    inputs: Sequence[str | list[int]]
    base64: bool

    def requests(self, parent: str) -> Iterator[pb.EmbedRequest]:
        for at in range(0, len(self.inputs), PART):
            yield pb.EmbedRequest(
                endpoint=f"{parent}/endpoints/{self.model}",
                inputs=[
                    pb.EmbedInput(text=i) if isinstance(i, str) else pb.EmbedInput(token_ids=pb.TokenIds(ids=i))
                    for i in self.inputs[at : at + PART]
                ],
            )

    def whole(self, parts: Sequence[pb.EmbedResponse]) -> dict[str, Any]:
        """The answer to it."""
        vectors = [list(e.values) for part in parts for e in part.embeddings]
        tokens = sum(part.usage.prompt_tokens for part in parts)
        return {
            "object": "list",
            "model": self.model,
            "data": [
                {"object": "embedding", "index": n, "embedding": _packed(v) if self.base64 else v}
                for n, v in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def read_embeddings(body: Any) -> Asked:
    """InvalidArgument (FIELD_UNKNOWN, FIELD_INVALID, FIELD_UNSUPPORTED)."""
    if not isinstance(body, dict):
        raise bad("", "the body must be a JSON object")
    for name in body:
        if name not in FIELDS:
            raise bad(name, f"is no field of this request{nearest(name, FIELDS)}", "FIELD_UNKNOWN")
    if body.get("dimensions") is not None:
        raise bad("dimensions", "is not supported here; the model's own are given", "FIELD_UNSUPPORTED")
    model, given, form = read_model(body.get("model")), body.get("input"), body.get("encoding_format", "float")
    if ":" in model:
        raise bad("model", "is an endpoint's adapter; encoders have none")
    if form not in ("float", "base64"):
        raise bad("encoding_format", "must be float or base64")
    inputs = [given] if isinstance(given, str) or _ids(given) else given
    if not isinstance(inputs, list) or not 1 <= len(inputs) <= MOST_INPUTS:
        raise bad("input", f"must be a text, or a list of 1 to {MOST_INPUTS} texts")
    for n, one in enumerate(inputs):
        if not (isinstance(one, str) and one) and not _ids(one):
            raise bad(f"input[{n}]", "must be a text, or a list of token ids, and not empty")
    return Asked(model, inputs, form == "base64")


def _ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(i) is int and 0 <= i < 2**31 for i in given)
