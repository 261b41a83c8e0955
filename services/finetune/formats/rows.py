"""Chats: a raw row with a list of turns to a conversation. Sources: OpenAI, Anthropic, ShareGPT, LLaVA, XTuner, TRL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from services.finetune.formats import Conversation, Message, RowError, tools
from services.finetune.formats.fields import Turns, flag, is_object, listed, optional, text
from services.finetune.formats.images import Images, place_images

Roles = Mapping[str, str]
_OPENAI_ROLES: Roles = {
    **dict.fromkeys(("system", "developer"), "system"),
    "user": "user",
    "assistant": "assistant",
    **dict.fromkeys(("tool", "function"), "tool"),
}
_ANTHROPIC_ROLES: Roles = {"system": "system", "user": "user", "assistant": "assistant"}
_WIZARD_ROLES: Roles = {"human": "user", "gpt": "assistant"}
_SHAREGPT_ROLES: Roles = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}
_OPENAI_SIDES = {
    "chosen": "preferred_output",
    "rejected": "non_preferred_output",
    "prompt": "input.messages",
    "tools": "input.tools",
}
"""Where OpenAI's preference rows have what the others call so."""
_OASST = re.compile(r"###\s*(Human|Assistant):")


def openai(row: Mapping[str, Any]) -> Conversation:
    """`loss` (XTuner), `weight` (OpenAI) or `train`, false or 0 at an assistant's turn, leaves it unlearned."""
    turns = Turns()
    for n, given in enumerate(listed(row, "messages")):
        _openai_turn(turns, given, f"messages[{n}]")
    turns.put_system(row)
    return turns.checked("messages[0].content", tools.definitions(row))


def _openai_turn(turns: Turns, given: Any, at: str) -> None:
    turn = is_object(given, at, "role and content")
    role = _role(turn, "role", at, _OPENAI_ROLES)
    if role == "assistant":
        calls = tools.calls(turn, at)
        content = "" if calls and turn.get("content") is None else _content(turn, "content", f"{at}.content")
        turns.add(Message(role, content, _trained(turn, at), calls), f"{at}.content")
        return
    content = _content(turn, "content", f"{at}.content")
    if role == "tool":
        call_id, name = (optional(turn, n, f"{at}.{n}") for n in ("tool_call_id", "name"))
        turns.add(Message(role, content, call_id=call_id, name=name), f"{at}.content")
    else:
        turns.add(Message(role, content), f"{at}.content")


def anthropic(row: Mapping[str, Any]) -> Conversation:
    """Contents are texts or lists of blocks: text, tool_use, tool_result. `system` stands beside."""
    turns = Turns()
    for n, given in enumerate(listed(row, "messages")):
        at = f"messages[{n}]"
        turn = is_object(given, at, "role and content")
        role = _role(turn, "role", at, _ANTHROPIC_ROLES)
        if isinstance(turn.get("content"), list | tuple):
            _blocks(turns, turn, role, at)
        else:
            trained = role != "assistant" or _trained(turn, at)
            turns.add(Message(role, text(turn, "content", f"{at}.content"), trained), f"{at}.content")
    system = row.get("system")
    turns.put_system({"system": _content(row, "system", "system") if system is not None else None})
    return turns.checked("messages[0].content", tools.definitions(row))


def _blocks(turns: Turns, turn: Mapping[str, Any], role: str, at: str) -> None:
    texts, calls = [], []
    for n, given in enumerate(listed(turn, "content", f"{at}.content")):
        path = f"{at}.content[{n}]"
        block = is_object(given, path, "a type")
        kind = block.get("type")
        if kind == "text":
            texts.append(text(block, "text", f"{path}.text"))
        elif kind == "tool_use" and role == "assistant":
            calls.append(tools.used(block, path))
        elif kind == "tool_result" and role == "user":
            result = _content(block, "content", f"{path}.content") if block.get("content") is not None else ""
            call_id = optional(block, "tool_use_id", f"{path}.tool_use_id")
            turns.add(Message("tool", result, call_id=call_id), f"{path}.content")
        else:
            message = f"{path}: a block of type {str(kind)[:40]!r} at a turn of {role} cannot be read; remove it"
            raise RowError(path, "PART_UNSUPPORTED", message)
    if role == "assistant":
        turns.add(Message(role, "".join(texts), _trained(turn, at), tuple(calls)), f"{at}.content")
    elif texts:
        turns.add(Message(role, "".join(texts)), f"{at}.content")


def sharegpt(row: Mapping[str, Any]) -> Conversation:
    """Turns are from/value or role/content; `system`, `tools` and `image` may stand beside."""
    return _shared(row, _SHAREGPT_ROLES)


def wizardlm(row: Mapping[str, Any]) -> Conversation:
    """XTuner's: human and gpt only."""
    return _shared(row, _WIZARD_ROLES)


def llava(row: Mapping[str, Any]) -> Conversation:
    """XTuner's: human and gpt; an <image> mark in a question stands for the image beside."""
    return _shared(row, _WIZARD_ROLES, "marked")


def llava_image_only(row: Mapping[str, Any]) -> Conversation:
    """XTuner's, to train a projector on captions: of each question only its <image> mark is kept."""
    return _shared(row, _WIZARD_ROLES, "only")


def _shared(row: Mapping[str, Any], roles: Roles, images: Images = "") -> Conversation:
    name = (
        "conversation" if row.get("conversations") is None and row.get("conversation") is not None else "conversations"
    )
    turns = Turns()
    for n, given in enumerate(listed(row, name)):
        _shared_turn(turns, given, f"{name}[{n}]", roles)
    turns.put_system(row)
    files = place_images(row, turns, images)
    return turns.checked(turns.fields[0] if turns.fields else f"{name}[0].value", tools.definitions(row), files)


def _shared_turn(turns: Turns, given: Any, at: str, roles: Roles) -> None:
    turn = is_object(given, at, "from and value")
    who = "role" if turn.get("from") is None and turn.get("role") is not None else "from"
    what = "content" if turn.get("value") is None and turn.get("content") is not None else "value"
    role, field = _role(turn, who, at, roles), f"{at}.{what}"
    trained = role not in ("assistant", "call") or _trained(turn, at)
    if role == "call":
        turns.add(Message("assistant", "", trained, tools.stated(text(turn, what, field), field)), field)
        return
    calls = tools.calls(turn, at) if role == "assistant" else ()
    content = "" if calls and turn.get(what) is None else _content(turn, what, field)
    turns.add(Message(role, content, trained, calls), field)


def default(row: Mapping[str, Any]) -> Conversation:
    """XTuner's own rows, or one {input, output}. `output_with_loss`, false, leaves an answer unlearned. A single answer
    to nothing is a running text."""
    if row.get("conversation") is None:
        given, name = [row], ""
    else:
        given, name = list(listed(row, "conversation")), "conversation"
    turns = Turns()
    for n, turn in enumerate(given):
        at = f"{name}[{n}]" if name else ""
        _default_turn(turns, is_object(turn, at, "input and output"), at)
    messages = turns.messages
    if len(messages) == 2 and messages[0].role == "user" and not messages[0].content and messages[1].content.strip():
        return Conversation((Message("text", messages[1].content, messages[1].trained, ends=True),))
    return turns.checked(turns.fields[0] if turns.fields else name)


def _default_turn(turns: Turns, turn: Mapping[str, Any], at: str) -> None:
    start = f"{at}." if at else ""
    for name in ("sep", "need_eos_token"):
        if turn.get(name) is not None:
            message = f"{start}{name} cannot be set by a row; remove it, the prompt template decides"
            raise RowError(f"{start}{name}", "FIELD_UNSUPPORTED", message)
    if system := optional(turn, "system", f"{start}system"):
        turns.add(Message("system", system), f"{start}system")
    turns.add(Message("user", text(turn, "input", f"{start}input")), f"{start}input")
    trained = flag(turn, "output_with_loss", at)
    turns.add(Message("assistant", text(turn, "output", f"{start}output"), trained), f"{start}output")


def oasst1(row: Mapping[str, Any]) -> Conversation:
    """`text` with turns behind ### Human: and ### Assistant:."""
    parts = _OASST.split(text(row, "text", "text"))
    if len(parts) == 1:
        raise RowError("text", "TURN_ORDER", "text has no ### Human: and ### Assistant:; name the format text")
    if parts[0].strip():
        raise RowError("text", "TURN_ORDER", "text begins with something else than ### Human:; remove it")
    turns = Turns()
    for who, said in zip(parts[1::2], parts[2::2], strict=True):
        turns.add(Message("user" if who == "Human" else "assistant", said.strip()), "text")
    return turns.checked("text")


def preference(row: Mapping[str, Any]) -> Conversation:
    """A better and a worse answer, kept for later use: neither is learned from as it stands."""
    chosen, rejected = _sides(row)
    messages = [replace(m, trained=False) if m.role == "assistant" else m for m in chosen.messages]
    return replace(chosen, messages=tuple(messages), rejected=(rejected.messages[-1],))


def preference_chosen(row: Mapping[str, Any]) -> Conversation:
    """The better answer of a pair, learned as any other."""
    return _sides(row)[0]


def _sides(row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    if row.get("preferred_output") is None:
        return _both(row)
    try:
        given = is_object(row.get("input"), "input", "messages")
        sides = {name: row.get(field) for name, field in _OPENAI_SIDES.items() if "." not in field}
        return _both({**sides, "prompt": given.get("messages"), "tools": given.get("tools")})
    except RowError as error:
        head = re.split(r"[.\[]", error.field, maxsplit=1)[0]
        field = _OPENAI_SIDES.get(head, head) + error.field[len(head) :]
        raise RowError(field, error.reason, error.message) from error


def _both(row: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    said = [[(m.role, m.content) for m in side.messages] for side in (chosen, rejected)]
    if said[0][:-1] != said[1][:-1]:
        message = "chosen and rejected differ before their last answers; both must answer the same question"
        raise RowError("rejected", "PREFERENCE_PROMPTS", message)
    if said[0] == said[1] and chosen.messages[-1].calls == rejected.messages[-1].calls:
        raise RowError("rejected", "PREFERENCE_EQUAL", "chosen and rejected are the same: nothing is preferred")
    return chosen, rejected


def _side(row: Mapping[str, Any], name: str) -> Conversation:
    """A side is a text, a message or a list of them; if it begins with a question, it holds the whole conversation."""
    value, turns = row.get(name), Turns()
    given = [value] if isinstance(value, Mapping) else value
    own = isinstance(given, list | tuple) and bool(given) and isinstance(given[0], Mapping)
    whole = own and str(given[0].get("role", given[0].get("from"))) not in ("assistant", "gpt")  # type: ignore[index]
    if not whole:
        _prompt(turns, row)
    if isinstance(given, str):
        turns.add(Message("assistant", text(row, name, name)), name)
    else:
        for n, turn in enumerate(listed({name: given}, name)):
            _either_turn(turns, turn, f"{name}[{n}]" if isinstance(value, list | tuple) else name)
    turns.put_system(row)
    side = turns.checked(turns.fields[-1] if turns.fields else name, tools.definitions(row))
    if len(side.messages) < len(turns.messages):
        raise RowError(turns.fields[-1], "ANSWER_MISSING", f"{name} does not end with an answer; add it")
    return side


def _prompt(turns: Turns, row: Mapping[str, Any]) -> None:
    name = next((n for n in ("prompt", "question", "conversations", "instruction") if row.get(n) is not None), "prompt")
    if isinstance(row.get(name), list | tuple):
        for n, turn in enumerate(listed(row, name)):
            _either_turn(turns, turn, f"{name}[{n}]")
    else:
        turns.add(Message("user", joined(text(row, name, name), optional(row, "input", "input"))), name)


def _either_turn(turns: Turns, turn: Any, at: str) -> None:
    if isinstance(turn, Mapping) and turn.get("from") is not None:
        _shared_turn(turns, turn, at, _SHAREGPT_ROLES)
    else:
        _openai_turn(turns, turn, at)


def joined(question: str, more: str) -> str:
    """An instruction and its input; without an input no line is left open."""
    return "\n".join(part for part in (question, more) if part)


def _trained(turn: Mapping[str, Any], at: str) -> bool:
    return all(flag(turn, name, at) for name in ("loss", "weight", "train"))


def _role(turn: Mapping[str, Any], who: str, at: str, roles: Roles) -> str:
    role = text(turn, who, f"{at}.{who}")
    if role not in roles:
        message = f"unknown role {role[:40]!r}; use one of {', '.join(roles)}"
        raise RowError(f"{at}.{who}", "ROLE_UNKNOWN", message)
    return roles[role]


def _content(turn: Mapping[str, Any], name: str, at: str) -> str:
    value = turn.get(name)
    if not isinstance(value, list | tuple):
        return text(turn, name, at)
    texts = []
    for n, part in enumerate(value):  # OpenAI's list of parts
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise RowError(f"{at}[{n}]", "PART_UNSUPPORTED", f"{at}[{n}]: only parts of type text can be read")
        texts.append(text(part, "text", f"{at}[{n}].text"))
    return "".join(texts)
