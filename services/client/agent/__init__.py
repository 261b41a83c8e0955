"""What an agent can do: tools that a model may call, run on the caller's own machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_RESULT_CHARS = 16_000
"""Of a tool's result, in the model's next prompt."""


class ToolError(Exception):
    """A tool could not do what it was asked; the message is for the model, which may try again."""


@dataclass(frozen=True, slots=True)
class Tool:
    """`parameters` is the JSON schema of the arguments; `call` gives the result, or raises ToolError."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    call: Callable[[Mapping[str, Any]], str]


def schema(required: Mapping[str, Mapping[str, Any]], **optional: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of an object."""
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }
