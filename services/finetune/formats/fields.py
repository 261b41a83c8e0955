"""Reading single fields of a row, each blamed by its path, and the rules that every conversation keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.finetune.formats import Conversation, Message, RowError, Tool

_SURROGATE = re.compile("[\ud800-\udfff]")
_LOSS = {True: True, False: False, "True": True, "False": False, "true": True, "false": False}
NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "system"),
    "tool": ("assistant", "tool", "user"),
}
"""Who may speak after whom; after a call its result may come too."""

JOINED = ("system", "user")
"""Turns of one of these that follow each other are one, a line each."""


class Turns:
    """Messages as they are read, with the field that each came from."""

    def __init__(self) -> None:
        self.fields: list[str] = []
        self._messages: list[Message] = []
        self._more: list[str] = []  # texts that belong to the last message; joined once, however many
        self._asked = False

    @property
    def messages(self) -> list[Message]:
        if self._more:
            last = self._messages[-1]
            texts = [t for t in (last.content, *self._more) if t]
            self._messages[-1], self._more = replace(last, content="\n".join(texts)), []
        return self._messages

    def add(self, message: Message, field: str) -> None:
        """Append a turn. Questions, and system texts, that follow each other are one, a line each; answers before the
        first question answer nothing and are left out."""
        if message.role == "assistant" and not self._asked:
            return
        if self._messages and self._messages[-1].role == message.role and message.role in JOINED:
            self._more.append(message.content)
            return
        self._asked = self._asked or message.role == "user"
        self.messages.append(message)
        self.fields.append(field)

    def put_system(self, row: Mapping[str, Any], name: str = "system") -> None:
        """A system text that stands beside the turns is their system turn, if they have none."""
        system = optional(row, name, name)
        if system and (not self.messages or self.messages[0].role != "system"):
            self.messages.insert(0, Message("system", system))
            self.fields.insert(0, name)

    def checked(self, of: str, tools: tuple[Tool, ...] = (), images: tuple[str, ...] = ()) -> Conversation:
        """The conversation, if it keeps the rules; `of` is blamed if there is no turn at all."""
        messages, fields = self.messages, self.fields
        if not self._asked:
            raise RowError(of, "TURN_ORDER", f"{of} has no turn of the user: an answer needs a question; add one")
        calls: dict[str, None] = {}
        for n, message in enumerate(messages):
            _check_order(messages, n, fields[n])
            _check_content(messages, n, fields[n])
            if message.role == "assistant":
                calls = dict.fromkeys(call.id for call in message.calls if call.id)
            elif message.role == "tool" and message.call_id and calls and message.call_id not in calls:
                raise _other_call(message.call_id, calls, fields[n])
        if not any(m.role == "assistant" for m in messages):
            raise RowError(fields[-1], "ANSWER_MISSING", "no turn of the assistant: there is nothing to learn; add one")
        if messages[-1].role == "system":
            raise RowError(fields[-1], "TURN_ORDER", "a system turn comes last; a question must follow it")
        end = len(messages)
        while messages[end - 1].role != "assistant":
            end -= 1  # an unanswered last question teaches nothing; ShareGPT logs often end so
        if not any(m.trained for m in messages if m.role == "assistant"):
            why = "every turn of the assistant is marked as not to be learned"
            raise RowError(fields[-1], "NOTHING_TRAINED", why)
        return Conversation(tuple(messages[:end]), tools, images)


def _check_order(messages: Sequence[Message], n: int, field: str) -> None:
    before = messages[n - 1] if n else None
    allowed = NEXT[before.role if before else ""] + (("tool",) if before and before.calls else ())
    if messages[n].role not in allowed:
        message = f"turn {n + 1} is of {messages[n].role}, expected {' or '.join(allowed)}: "
        message += "user and assistant take turns, a system turn stands before a question, a tool's after its call"
        raise RowError(field, "TURN_ORDER", message)


def _check_content(messages: Sequence[Message], n: int, field: str) -> None:
    message = messages[n]
    if message.role == "assistant" and not message.content.strip() and not message.calls:
        raise RowError(field, "ANSWER_EMPTY", f"{field} is empty: there is nothing to learn; fill it in")
    if message.role == "user" and not message.content and not (n > 1 and messages[n - 1].role == "system"):
        raise RowError(field, "QUESTION_EMPTY", f"{field} is empty; fill it in")


def _other_call(wanted: str, calls: Iterable[str], field: str) -> RowError:
    message = f"the result names the call {wanted[:40]!r}, but the calls before it are {', '.join(calls)[:200]}"
    return RowError(field, "TOOL_CALL_UNKNOWN", message)


def text(row: Mapping[str, Any], name: str, at: str) -> str:
    value = row.get(name)
    if value is None:
        raise RowError(at, "FIELD_MISSING", f"{at} is missing; add it, a text")
    return is_text(value, at)


def is_text(value: Any, at: str) -> str:
    """`value`, if it is a text that can be encoded."""
    if not isinstance(value, str):
        raise RowError(at, "FIELD_TYPE", f"{at} must be a text, not {type(value).__name__}")
    if _SURROGATE.search(value):
        raise RowError(at, "TEXT_INVALID", f"{at} holds half a surrogate pair, which is no character; remove it")
    return value


def optional(row: Mapping[str, Any], name: str, at: str) -> str:
    return "" if row.get(name) is None else text(row, name, at)


def flag(turn: Mapping[str, Any], name: str, at: str) -> bool:
    value = turn.get(name)
    if value is None:
        return True
    if not isinstance(value, bool | int | float | str) or value not in _LOSS:
        raise RowError(f"{at}.{name}", "FIELD_TYPE", f"{at}.{name} must be true or false")
    return _LOSS[value]


def listed(row: Mapping[str, Any], name: str, at: str = "") -> Sequence[Any]:
    """A list that is not empty."""
    at, value = at or name, row.get(name)
    if value is None:
        raise RowError(at, "FIELD_MISSING", f"{at} is missing; add it, a list of turns")
    if not isinstance(value, list | tuple) or not value:
        raise RowError(at, "FIELD_TYPE", f"{at} must be a list with at least one turn")
    return value


def is_object(value: Any, at: str, holds: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RowError(at, "FIELD_TYPE", f"{at} must be an object with {holds}")
    return value


def from_json(value: str, at: str, reason: str) -> Any:
    """The value of a text of JSON inside a field."""
    try:
        return json.loads(is_text(value, at))
    except (ValueError, RecursionError) as error:
        raise RowError(at, reason, f"{at} is no JSON: {str(error)[:100]}; mend it") from error
