"""One function a format: a raw row to a conversation. Sources: OpenAI's chat messages, Stanford Alpaca, ShareGPT, XTuner."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from services.finetune.formats import Conversation, Message, RowError

_OPENAI_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_LOSS = {True: True, False: False, "True": True, "False": False, "true": True, "false": False}


def openai(row: Mapping[str, Any]) -> Conversation:
    """`loss` (XTuner) or `weight` (OpenAI), false or 0 at an assistant's turn, leaves it unlearned."""
    return _checked(*_turns(row, "messages", "role", "content", _OPENAI_ROLES))


def sharegpt(row: Mapping[str, Any]) -> Conversation:
    """A `system` beside the conversations is their system turn, if they have none."""
    messages, fields = _turns(row, "conversations", "from", "value", _SHAREGPT_ROLES)
    return _with_system(row, messages, fields)


def alpaca(row: Mapping[str, Any]) -> Conversation:
    question, answer = _text(row, "instruction", "instruction"), _text(row, "output", "output")
    if answer.strip() == "<nooutput>":  # Alpaca's own mark
        raise RowError("output", "ANSWER_EMPTY", "output is <nooutput>: there is nothing to learn; remove the row")
    extra = _optional(row, "input", "input")
    messages = [Message("user", f"{question}\n{extra}" if extra else question), Message("assistant", answer)]
    return _with_system(row, messages, ["instruction", "output"])


def default(row: Mapping[str, Any]) -> Conversation:
    """XTuner's own rows. `output_with_loss`, false, leaves an answer unlearned."""
    messages: list[Message] = []
    fields: list[str] = []
    for n, turn in enumerate(_list(row, "conversation")):
        at = f"conversation[{n}]"
        if not isinstance(turn, Mapping):
            raise RowError(at, "FIELD_TYPE", f"{at} must be an object with input and output")
        for name in ("sep", "need_eos_token"):
            if turn.get(name) is not None:
                message = f"{at}.{name} cannot be set by a row; remove it, the prompt template decides"
                raise RowError(f"{at}.{name}", "FIELD_UNSUPPORTED", message)
        if system := _optional(turn, "system", f"{at}.system"):
            messages.append(Message("system", system))
            fields.append(f"{at}.system")
        trained = _flag(turn, "output_with_loss", at)
        messages.append(Message("user", _text(turn, "input", f"{at}.input")))
        messages.append(Message("assistant", _text(turn, "output", f"{at}.output"), trained))
        fields += [f"{at}.input", f"{at}.output"]
    return _checked(messages, fields)


def _turns(
    row: Mapping[str, Any], name: str, who: str, what: str, roles: Mapping[str, str]
) -> tuple[list[Message], list[str]]:
    messages, fields = [], []
    for n, turn in enumerate(_list(row, name)):
        at = f"{name}[{n}]"
        if not isinstance(turn, Mapping):
            raise RowError(at, "FIELD_TYPE", f"{at} must be an object with {who} and {what}")
        role = _text(turn, who, f"{at}.{who}")
        if role not in roles:
            message = f"unknown role {role[:40]!r}; use one of {', '.join(roles)}"
            raise RowError(f"{at}.{who}", "ROLE_UNKNOWN", message)
        trained = _flag(turn, "loss", at) and _flag(turn, "weight", at)
        messages.append(Message(roles[role], _content(turn, what, f"{at}.{what}"), trained))
        fields.append(f"{at}.{what}")
    return messages, fields


def _with_system(row: Mapping[str, Any], messages: list[Message], fields: list[str]) -> Conversation:
    system = _optional(row, "system", "system")
    if system and messages[0].role != "system":
        messages, fields = [Message("system", system), *messages], ["system", *fields]
    return _checked(messages, fields)


def _content(turn: Mapping[str, Any], name: str, at: str) -> str:
    value = turn.get(name)
    if not isinstance(value, list):
        return _text(turn, name, at)
    texts = []
    for n, part in enumerate(value):  # OpenAI's list of parts
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RowError(f"{at}[{n}]", "PART_UNSUPPORTED", f"{at}[{n}]: only parts of type text can be read")
        texts.append(_text(part, "text", f"{at}[{n}].text"))
    return "".join(texts)


def _text(row: Mapping[str, Any], name: str, at: str) -> str:
    value = row.get(name)
    if value is None:
        raise RowError(at, "FIELD_MISSING", f"{at} is missing; add it, a text")
    if not isinstance(value, str):
        raise RowError(at, "FIELD_TYPE", f"{at} must be a text, not {type(value).__name__}")
    if _SURROGATE.search(value):
        raise RowError(at, "TEXT_INVALID", f"{at} holds half a surrogate pair, which is no character; remove it")
    return value


def _optional(row: Mapping[str, Any], name: str, at: str) -> str:
    return "" if row.get(name) is None else _text(row, name, at)


def _flag(turn: Mapping[str, Any], name: str, at: str) -> bool:
    value = turn.get(name)
    if value is None:
        return True
    if not isinstance(value, bool | int | float | str) or value not in _LOSS:
        raise RowError(f"{at}.{name}", "FIELD_TYPE", f"{at}.{name} must be true or false")
    return _LOSS[value]


def _list(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = row.get(name)
    if value is None:
        raise RowError(name, "FIELD_MISSING", f"{name} is missing; add it, a list of turns")
    if not isinstance(value, list | tuple) or not value:
        raise RowError(name, "FIELD_TYPE", f"{name} must be a list with at least one turn")
    return value


def _checked(messages: list[Message], fields: list[str]) -> Conversation:
    """The rules that every conversation keeps, whatever it came from."""
    start = 1 if messages and messages[0].role == "system" else 0
    for n, message in enumerate(messages):
        wanted = "system" if n < start else ("user", "assistant")[(n - start) % 2]
        if message.role != wanted:
            raise RowError(
                fields[n],
                "TURN_ORDER",
                f"turn {n + 1} is of {message.role}, expected {wanted}: an optional system turn comes first, then user "
                "and assistant take turns",
            )
        if message.role == "assistant" and not message.content.strip():
            raise RowError(fields[n], "ANSWER_EMPTY", f"{fields[n]} is empty: there is nothing to learn; fill it in")
        if message.role == "user" and not message.content:
            raise RowError(fields[n], "QUESTION_EMPTY", f"{fields[n]} is empty; fill it in")
    if len(messages) <= start + 1:
        raise RowError(fields[-1], "ANSWER_MISSING", "no turn of the assistant: there is nothing to learn; add one")
    if messages[-1].role == "user":
        messages = messages[:-1]  # an unanswered last question teaches nothing; ShareGPT logs often end so
    if not any(m.trained for m in messages if m.role == "assistant"):
        raise RowError(fields[-1], "NOTHING_TRAINED", "every turn of the assistant is marked as not to be learned")
    return Conversation(tuple(messages))
