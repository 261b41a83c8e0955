"""Calls of tools in answers: how a template writes them is seen from what it renders, and read back as answers come.

There are many forms, and each model knows the one of its own template:

    <tool_call>\\n{"name": …, "arguments": …}\\n</tool_call>          objects between marks (Hermes, Qwen)
    [TOOL_CALLS] [{"name": …, "arguments": …, "id": …}, …]           objects in a list (Mistral)
    {"name": …, "parameters": …}                                    one object, which is the whole answer (Llama 3)
    <|action_start|><|plugin|>\\n{"name": …, …}<|action_end|>         between special tokens (InternLM2)
    [TOOL_CALLS]name[ARGS]{…}                                       a bare name, then arguments (Mistral, DeepSeek)

None is named here: a probe is rendered, and what stands around its parts is the form. Forms in which the arguments are
no JSON object are refused.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from services.finetune.errors import InvalidArgument
from services.finetune.formats import Call, Conversation, Message
from services.finetune.templates import Template

ID_CHARS, ID_LENGTH = string.ascii_letters + string.digits, 9
"""Of the ids that are given to calls: Mistral's templates take no others."""
NAME = r"[A-Za-z0-9_.-]{1,64}"

Slot = Literal["name", "arguments", "id"]

_PROBES = tuple(Call(f"probe_{w}", {"left": w, "right": [1, 2]}, w * 2 + "xyz") for w in ("one", "two"))
_SAID = "Something said."
_DECODER = json.JSONDecoder(strict=False)  # models write line ends into texts


@dataclass(frozen=True, slots=True)
class CallForm:
    """How an answer's calls are written: `opening`, a call, `joint`, another one …, `closing`.

    `call` is its text, with slots in place of its name, arguments and id. `keys` are the names of the name's and the
    arguments' fields, where it is one JSON object. Without `joint` an answer has one call. `mark` is the text that tells
    an answer's calls from what it says; "" if calls are the whole answer. `separators` are JSON's in the arguments.
    """

    opening: str
    call: tuple[str | tuple[Slot], ...]
    joint: str | None
    closing: str
    keys: tuple[str, str] | None
    mark: str
    separators: tuple[str, str]

    @property
    def texts(self) -> list[str]:
        """All that stands around names, arguments and ids."""
        return [self.opening, self.joint or "", self.closing, *(p for p in self.call if isinstance(p, str))]


def find_form(template: Template, special_texts: Collection[str]) -> CallForm:
    """The form of a template's calls. InvalidArgument (TOOLS_UNSUPPORTED)."""
    lead = _answer(template, _SAID).partition(_SAID)[0]
    one = _answer(template, "", *_PROBES[:1]).removeprefix(lead)
    found = _located(one, _PROBES[0])
    if found is None:
        raise _unreadable(template)
    start, end, keys = found
    form = CallForm(
        opening=one[:start],
        call=_slots(one[start:end], _PROBES[0]),
        joint=None,
        closing=one[end:],
        keys=keys,
        mark=_mark(one[:start], special_texts),
        separators=(", " if ', "right"' in one else ",", ": " if '"left": ' in one else ":"),
    )
    if not form.mark and not keys:
        raise _unreadable(template)  # nothing tells a call from what is said
    return replace(form, joint=_joint(template, form, lead))


def _unreadable(template: Template) -> InvalidArgument:
    return InvalidArgument(
        f"the template {template.name} writes calls of tools in a form that cannot be read back; ask without tools",
        reason="TOOLS_UNSUPPORTED",
    )


def _answer(template: Template, content: str, *calls: Call) -> str:
    """What the template writes for an answer, without its end of turn."""
    tools = [{"type": "function", "function": {"name": c.name, "parameters": {"type": "object"}}} for c in _PROBES]
    turns = (Message("user", "q"), Message("assistant", content, calls=calls))
    pieces = template.pieces(Conversation(turns, tuple(tools) if calls else ()))
    text = "".join(p.text for p in pieces if p.trained)
    ends = [s for s in template.stop if s and text.endswith(s)]
    return text.removesuffix(max(ends, key=len)) if ends else text


def _located(text: str, call: Call) -> tuple[int, int, tuple[str, str] | None] | None:
    """(start, end, the keys of name and arguments if it is one object) of a call in a text."""
    for at in (m.start() for m in re.finditer(r"\{", text)):
        value, end = _decoded(text, at)
        if isinstance(value, Mapping) and call.name in value.values():
            by_value = {str(v): k for k, v in value.items()}
            arguments = next((k for k, v in value.items() if v == call.arguments), None)
            return (at, end, (by_value[call.name], arguments)) if arguments is not None else None
        if value == call.arguments and call.name in text[:at]:
            return text.index(call.name), end, None
    return None


def _slots(text: str, call: Call) -> tuple[str | tuple[Slot], ...]:
    at = next(m.start() for m in re.finditer(r"\{", text) if _decoded(text, m.start())[0] == call.arguments)
    words: dict[str, Slot] = {call.name: "name", text[at : _decoded(text, at)[1]]: "arguments", call.id: "id"}
    parts = re.split("(" + "|".join(map(re.escape, words)) + ")", text)
    return tuple((words[p],) if p in words else p for p in parts if p)


def _joint(template: Template, form: CallForm, lead: str) -> str | None:
    try:
        two = _answer(template, "", *_PROBES).removeprefix(lead)
    except InvalidArgument:
        return None  # a template that takes one call at a time says so
    first, second = _located(two, _PROBES[0]), _located(two[len(form.opening) :], _PROBES[1])
    if first is None or second is None:
        return None
    begin, end = (n + len(form.opening) for n in second[:2])
    return two[first[1] : begin] if two[end:] == form.closing else None


def _mark(opening: str, special_texts: Collection[str]) -> str:
    specials = sorted((at, s) for s in special_texts if s and (at := opening.find(s)) >= 0)
    return specials[0][1] if specials else (opening.split() or [""])[0]


def _decoded(text: str, at: int) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None, at


def match(text: str, at: int, wanted: str) -> int | None:
    """Where `wanted`, blanks aside, ends in `text` if it stands at `at`; -1 if it does not; None if more may come."""
    for char in "".join(wanted.split()):
        while at < len(text) and text[at].isspace():
            at += 1
        if at == len(text):
            return None
        if text[at] != char:
            return -1
        at += 1
    return at


class CallReader:
    """Text and calls of one answer as it comes. No part of a call is ever given out as text, and no text is lost: what
    looks like a call and is none comes out as it stands.

    Where calls have no mark, only those of tools in `known` are calls.
    """

    def __init__(self, form: CallForm, known: Collection[str]) -> None:
        self._form = form
        self._known = known
        self._held = ""
        self._inside: int | None = None  # in `_held`: where a call may begin, behind its mark
        self._opened = False  # whether what opens the calls is behind
        self._between = False  # behind a call: its closing or joint comes
        self._talks = False  # without a mark: it is an answer that says something
        self._object = ObjectEnd()
        self.calls = 0

    def push(self, text: str, last: bool) -> tuple[str, list[Call]]:
        """What is clear by now: new text, and the calls that became whole. `last` is of the answer's last text."""
        self._held += text
        said, calls, going = "", list[Call](), True
        while going:
            if self._between:
                going = self._pass_between(last)
            elif self._inside is None:
                new, going = self._until_mark(last)
                said += new
            else:
                call, new, going = self._read(last)
                said += new
                calls += [call] if call else []
                self.calls += call is not None
        return said, calls

    def _until_mark(self, last: bool) -> tuple[str, bool]:
        held, mark = self._held, self._form.mark
        if not mark:
            begins = held.lstrip()
            if not self._talks and begins[:1] == "{":
                self._inside, self._opened = len(held) - len(begins), False
                return "", True
            if not self._talks and not begins and not last:
                return "", False
            self._talks, self._held = True, ""
            return held, False
        if (at := held.find(mark)) >= 0:
            before = held[:at].rstrip()
            self._held = held[len(before) :]
            self._inside, self._opened = at - len(before) + len(mark), False
            return before, True
        if last:
            self._held = ""
            return ("" if self.calls and held.isspace() else held), False
        kept = next(n for n in range(min(len(mark) - 1, len(held)), -1, -1) if held.endswith(mark[:n]))
        out = held[: len(held) - kept].rstrip()
        self._held = held[len(out) :]
        return out, False

    def _read(self, last: bool) -> tuple[Call | None, str, bool]:
        """(a call, text, whether to go on) at `_inside`."""
        assert self._inside is not None
        found = self._call_at(self._inside)
        if found is None and not last:
            return None, "", False
        if not isinstance(found, tuple):
            out, self._held = self._held[: self._inside], self._held[self._inside :]
            self._inside, self._talks, self._object = None, True, ObjectEnd()
            return None, out, True
        call, end = found
        self._held, self._inside, self._between, self._object = self._held[end:], None, True, ObjectEnd()
        return call, "", True

    def _call_at(self, at: int) -> tuple[Call, int] | Literal[False] | None:
        """(call, its end), None if more must come, False if it is none."""
        form, held = self._form, self._held
        if not self._opened:
            rest = form.opening.partition(form.mark)[2] if form.mark else form.opening
            begins = match(held, at, rest)
            if begins is None or begins < 0:
                return None if begins is None else False
            at = begins
        start = held.find("{", at)
        name = "" if form.keys else self._bare_name(held[at:start] if start >= 0 else held[at:], start >= 0)
        if name is None or (form.keys and held[at : start if start >= 0 else None].strip()):
            return False
        if start < 0 or (end := self._object.find(held, start)) is None:
            return None
        value, stop = _decoded(held, start)
        if stop != end or not isinstance(value, dict):
            return False
        arguments = value
        if form.keys:
            name, arguments = value.get(form.keys[0]), value.get(form.keys[1], {})
        if not isinstance(name, str) or not name or not isinstance(arguments, dict):
            return False
        if not form.mark and name not in self._known:
            return False
        return Call(name, arguments, new_id()), end

    def _bare_name(self, text: str, whole: bool) -> str | None:
        """The name before arguments; "" if it may still come, None if it cannot."""
        form = self._form
        before = form.call[: form.call.index(("arguments",))]
        if not whole:
            return "" if len(text) < 256 else None
        fill = {("name",): f"(?P<name>{NAME})", ("id",): "[A-Za-z0-9_-]+"}
        pattern = r"\s*".join(r"\s*".join(map(re.escape, p.split())) if isinstance(p, str) else fill[p] for p in before)
        found = re.fullmatch(rf"\s*{pattern}\s*", text)
        return found["name"] if found else None

    def _pass_between(self, last: bool) -> bool:
        form = self._form
        closed = match(self._held, 0, form.closing)
        joined = -1 if form.joint is None or not form.joint.strip() else match(self._held, 0, form.joint)
        if closed is not None and closed >= 0 and form.closing.strip():
            self._held = self._held[closed:]
        elif joined is not None and joined >= 0:
            self._held, self._inside, self._opened = self._held[joined:], 0, True
        elif (closed is None or joined is None) and not last:
            return False
        elif last and (closed is None or joined is None):
            self._held = ""  # an answer that ends without closing its calls
        self._between, self._talks = False, True
        return True


class ObjectEnd:
    """Finds where a JSON object that comes bit by bit ends, looking at each character once."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._quoted = self._escaped = False

    def find(self, text: str, start: int) -> int | None:
        """The end of the object that begins at `start`, None while it has none. `text` only grows between calls."""
        for at in range(max(self._at, start), len(text)):
            char = text[at]
            if self._quoted:
                self._quoted = self._escaped or char != '"'
                self._escaped = char == "\\" and not self._escaped
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at + 1
        self._at = len(text)
        return None


def new_id() -> str:
    return "".join(secrets.choice(ID_CHARS) for _ in range(ID_LENGTH))


# ---------------------------------------------------------------------------------------------- forced forms


def grammar(
    form: CallForm,
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    special_ids: Mapping[str, int],
    *,
    free: bool,
    many: bool,
    answer: str = "",
) -> str:
    """A grammar of llguidance's of answers that call one of `tools`, (name, schema of its arguments).

    With `free` an answer may also say something, or, with the JSON schema `answer`, be of that; then calls have a mark.
    """

    def fixed(text: str) -> str:
        """A text in the grammar; a special token in it is that token."""
        parts = re.split("(" + "|".join(map(re.escape, special_ids)) + ")", text) if special_ids else [text]
        return " ".join(f"<[{special_ids[p]}]>" if p in special_ids else json.dumps(p) for p in parts if p)

    rules = []
    for n, (name, schema) in enumerate(tools):
        fill = {("name",): json.dumps(name), ("arguments",): f"args{n}", ("id",): f"/[A-Za-z0-9]{{{ID_LENGTH}}}/"}
        parts = [fixed(p) if isinstance(p, str) else fill[p] for p in form.call]
        rules += [f"call{n}: {' '.join(parts)}", f"args{n}: %json {_told(schema, form.separators)}"]
    rules.append("call: " + " | ".join(f"call{n}" for n in range(len(tools))))
    more = f" ({fixed(form.joint)} call)*" if many and form.joint and form.joint.strip() else ""
    calls = f"call{more} {fixed(form.closing)}"
    opening = fixed(form.opening)
    if not free:
        return "\n".join([f"start: {opening} {calls}", *rules])
    if answer:
        rules.append(f"said: %json {_told(json.loads(answer), (',', ':'))}")
        return "\n".join([f"start: said | {opening} {calls}", *rules])
    mark, rest = form.mark, fixed(form.opening.partition(form.mark)[2] if form.mark else form.opening)
    if not mark:
        rules.append(r"SAID: /(?s:.*)/ & ~/\s*\{(?s:.*)/")
        return "\n".join([f"start: SAID | {opening} {calls}", *rules])
    if mark in special_ids:
        rules.append("SAID: /(?s:.+)/")
        return "\n".join([f"start: SAID? ({fixed(mark)} {rest} {calls})?", *rules])
    rules += [
        f"SAID: /(?s:.*)/ & ~/(?s:.*){_regex(mark)}(?s:.*)/",
        f"lead[suffix={json.dumps(mark)}]: /(?s:.*)/",
    ]
    return "\n".join([f"start: SAID | lead {rest} {calls}", *rules])


def _regex(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def _told(schema: Mapping[str, Any], separators: tuple[str, str]) -> str:
    """A schema whose JSON is written as the template writes it."""
    item, key = separators
    how = {"whitespace_flexible": False, "item_separator": item, "key_separator": key}
    return json.dumps({**schema, "x-guidance": how})
