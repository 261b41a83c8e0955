"""The turns and tools of a chat, read from the wire and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import InvalidArgument, blamed
from services.finetune.formats import IMAGE, Call, Message, Tool
from services.finetune.formats.fields import JOINED, NEXT
from services.inference.engines.calls import NAME

ROLES = {
    pb.Message.SYSTEM: "system",
    pb.Message.USER: "user",
    pb.Message.ASSISTANT: "assistant",
    pb.Message.TOOL: "tool",
}


def read_turns(messages: Sequence[pb.Message], vocabulary: int) -> list[Message]:
    """Turns with an <image> mark for each image; questions that follow each other are one, as in training, and so are system
    texts. InvalidArgument (MESSAGES_EMPTY, ROLE_ORDER, TOKENS_INVALID, TOOLS_INVALID, IMAGE_MISPLACED)."""
    if any(p.HasField("image") for m in messages for p in m.content):
        _check_marks(messages)
    for n, message in enumerate(messages):
        field = f"messages[{n}].token_ids"
        if message.token_ids and message.role != pb.Message.ASSISTANT:
            raise blamed(field, "only an assistant's turn has the tokens of an answer", "TOKENS_INVALID")
        if not all(0 <= i < vocabulary for i in message.token_ids):
            raise blamed(field, f"tokens are from 0 to {vocabulary - 1}", "TOKENS_INVALID")
    turns = [_turn(f"messages[{n}]", m) for n, m in enumerate(messages)]
    check_turns(turns)
    return _joined(_answered(turns))


def _turn(where: str, message: pb.Message) -> Message:
    calls = tuple(
        Call(c.name, _object(f"{where}.tool_calls[{n}].arguments", c.arguments), c.id)
        for n, c in enumerate(message.tool_calls)
    )
    text = _text(message)
    told, ids = message.tool_call_id, tuple(message.token_ids)
    return Message(ROLES.get(message.role, ""), text, calls=calls, call_id=told, ids=ids)


def _text(message: pb.Message) -> str:
    """What a turn says; an image is a mark on a line of its own, as training data have it."""
    text = ""
    for part in message.content:
        image = part.HasField("image")
        apart = (image and text) or (text.endswith(IMAGE) and not part.text.startswith("\n") and part.text)
        text += "\n" if apart and not text.endswith("\n") else ""
        text += IMAGE if image else part.text
    return text


def _check_marks(messages: Sequence[pb.Message]) -> None:
    """InvalidArgument (IMAGE_MISPLACED) for what would be taken for an image, or an image where none is seen."""
    for n, message in enumerate(messages):
        for k, part in enumerate(message.content):
            field, user = f"messages[{n}].content[{k}]", message.role == pb.Message.USER
            if part.HasField("image") and not user:
                raise blamed(field, "only a user's turn shows images", "IMAGE_MISPLACED")
            if user and IMAGE in part.text:
                why = f"beside images the text may not hold {IMAGE}; an image's place is its part's"
                raise blamed(field, why, "IMAGE_MISPLACED")


def check_turns(turns: Sequence[Message]) -> None:
    """InvalidArgument (MESSAGES_EMPTY, ROLE_ORDER) unless each answer follows a question, each call is followed by its
    results, and a user's turn or a result comes last. System turns may stand before a user's, as in training."""
    if not turns:
        raise InvalidArgument("a chat needs a message of the user's", reason="MESSAGES_EMPTY")
    for n, turn in enumerate(turns):
        before = turns[n - 1] if n else None
        role = before.role if before else ""
        expected = ("tool",) if before and before.calls else NEXT[role] + ((role,) if role in JOINED else ())
        if turn.role not in expected:
            raise _bad_role(n, f"expected {' or '.join(expected)}, not {turn.role or 'a message without a role'}")
        if turn.calls and turn.role != "assistant":
            raise _bad_role(n, f"only the assistant calls tools, not {turn.role}")
    if turns[-1].role == "system":
        raise _bad_role(len(turns), "expected user, not nobody")
    if turns[-1].role not in ("user", "tool"):
        raise _bad_role(len(turns) - 1, "the last message must be the user's, or a tool's result")


def _joined(turns: Sequence[Message]) -> list[Message]:
    """`turns` in which questions, or system texts, in a row are one, a line each."""
    found: list[Message] = []
    for role, group in groupby(turns, key=lambda t: t.role):
        run = list(group)
        if role in JOINED:
            run = [replace(run[0], content="\n".join(t.content for t in run if t.content))]
        found += run
    return found


def _answered(turns: Sequence[Message]) -> list[Message]:
    """`turns` in which each result tells its call and tool: templates want one or the other."""
    found: list[Message] = []
    open_calls: list[Call] = []
    for n, turn in enumerate(turns):
        if turn.role == "tool":
            named = [c for c in open_calls if c.id == turn.call_id] if turn.call_id else open_calls[:1]
            if not named:
                ids = ", ".join(c.id for c in open_calls if c.id) or "none"
                raise _bad_tools(f"messages[{n}].tool_call_id", f"answers no call; those without a result are: {ids}")
            open_calls.remove(named[0])
            turn = Message("tool", turn.content, call_id=named[0].id, name=named[0].name)
        else:
            if open_calls:
                raise _bad_tools(f"messages[{n}]", f"comes before the result of {open_calls[0].name}")
            open_calls = list(turn.calls)
        found.append(turn)
    if open_calls:
        raise _bad_tools(f"messages[{len(turns) - 1}]", f"comes last, but {open_calls[0].name} has no result yet")
    return found


def read_tools(tools: Sequence[pb.Tool]) -> list[Tool]:
    """As OpenAI writes them, which is what templates want. InvalidArgument (TOOLS_INVALID)."""
    found: dict[str, Tool] = {}
    for n, tool in enumerate(tools):
        where = f"tools[{n}]"
        if not re.fullmatch(NAME, tool.name):
            raise _bad_tools(f"{where}.name", "must be 1 to 64 letters, digits, '_', '-' or '.'")
        if tool.name in found:
            raise _bad_tools(f"{where}.name", f"two tools have the name {tool.name}")
        function: dict[str, Any] = {"name": tool.name}
        if tool.description:
            function["description"] = tool.description
        if tool.parameters:
            function["parameters"] = _object(f"{where}.parameters", tool.parameters)
        found[tool.name] = {"type": "function", "function": function}
    return list(found.values())


def check_choice(choice: pb.ToolChoice, tools: Sequence[Tool]) -> None:
    """InvalidArgument (TOOLS_INVALID)."""
    names = [t["function"]["name"] for t in tools]
    if choice.name and (choice.mode != pb.ToolChoice.REQUIRED or choice.name not in names):
        why = f"{choice.name[:64]!r} is none of the tools" if choice.name not in names else "goes with mode REQUIRED"
        raise _bad_tools("tool_choice.name", why)
    if choice.mode == pb.ToolChoice.REQUIRED and not names:
        raise _bad_tools("tool_choice", "demands a call, but there are no tools")


def _object(where: str, text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise _bad_tools(where, f"is no JSON: {str(error)[:100]}") from error
    if not isinstance(value, dict):
        raise _bad_tools(where, "must be a JSON object")
    return value


def _bad_role(n: int, why: str) -> InvalidArgument:
    return blamed(f"messages[{n}].role", why, "ROLE_ORDER")


def _bad_tools(field: str, why: str) -> InvalidArgument:
    return blamed(field, why, "TOOLS_INVALID")
