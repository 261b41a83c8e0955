"""Whatever a row holds, it becomes a conversation or is blamed; nothing else is ever raised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.finetune.formats import FORMATS, Conversation, RowError, detect, format_named
from services.finetune.formats.react import literal

texts = st.text(max_size=12) | st.sampled_from(
    [
        "user",
        "assistant",
        "system",
        "tool",
        "human",
        "gpt",
        "function_call",
        "<image>",
        "a.jpg",
        "{}",
        "[]",
        "### Human: a",
        "<|startofthink|>{}<|endofthink|>",
        "<|startofexec|>[]<|endofexec|>x",
        "text",
        "tool_use",
        "[{'from': 'user'}]",
    ]
)
leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | texts
turn_fields = ["role", "content", "from", "value", "input", "output", "system", "loss", "weight", "id", "type", "text"]
call_fields = ["tool_calls", "function_call", "function", "name", "arguments", "tool_use_id", "turn_1", "Human"]
inner = st.sampled_from([*turn_fields, *call_fields])
values = st.recursive(
    leaves, lambda v: st.lists(v, max_size=4) | st.dictionaries(inner, v, max_size=4), max_leaves=12
)  # fmt: skip
fields = st.sampled_from(sorted({f for form in FORMATS.values() for f in (*form.fields, *form.optional)}))
rows = st.dictionaries(fields, values, max_size=6)


def whole(format: str) -> st.SearchStrategy[dict[str, Any]]:
    """Rows that have the fields of a format, of whatever kind."""
    form = FORMATS[format]
    needed: dict[Any, st.SearchStrategy[Any]] = dict.fromkeys(form.fields, values)
    extra: dict[Any, st.SearchStrategy[Any]] = dict.fromkeys(form.optional, values)
    return st.fixed_dictionaries(needed, optional=extra)


def converted(format: str, row: dict[str, Any]) -> Conversation | None:
    try:
        return format_named(format).convert(row)
    except RowError as error:
        assert error.field and error.reason.isupper() and error.message.encode()
        return None


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_rows_are_read_or_blamed(format: str, data: st.DataObject) -> None:
    found = converted(format, data.draw(whole(format) | rows))
    if found is not None:
        answers = [m for m in found.messages if m.role in ("assistant", "text")]
        assert answers and found.messages[-1].role in ("assistant", "text")
        assert all(m.content.strip() or m.calls for m in answers)


@given(row=rows)
def test_any_row_can_be_looked_at(row: dict[str, Any]) -> None:
    for form in FORMATS.values():
        assert form.fits is None or form.fits(row) in (True, False)
    if any(form.fits(row) for form in FORMATS.values() if form.fits is not None):
        assert detect(row)[0] in FORMATS


said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(lambda t: bool(t.strip()))
talks = st.lists(st.tuples(said, said), min_size=1, max_size=4)


@given(turns=talks, system=st.none() | said)
def test_one_talk_in_many_formats_is_one_conversation(turns: list[tuple[str, str]], system: str | None) -> None:
    names = ("user", "assistant")
    flat = [(names[n], text) for turn in turns for n, text in enumerate(turn)]
    head = [("system", system)] if system else []
    chat = [{"role": role, "content": text} for role, text in [*head, *flat]]
    shared = [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": text} for r, text in [*head, *flat]]
    blocks = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in flat]
    *history, (question, answer) = turns
    own = [{"input": q, "output": a} for q, a in turns]
    rows: list[tuple[str, dict[str, Any]]] = [
        ("openai", {"messages": chat}),
        ("sharegpt", {"conversations": shared}),
        ("anthropic", {"messages": blocks, "system": system}),
        ("alpaca", {"instruction": question, "output": answer, "history": history, "system": system}),
        ("default", {"conversation": [{**own[0], "system": system}, *own[1:]]}),
        ("preference_chosen", {"chosen": chat, "rejected": [*chat[:-1], {**chat[-1], "content": answer + "!"}]}),
    ]
    said_so = {format_named(format).convert(row) for format, row in rows}
    assert len(said_so) == 1
    assert [(m.role, m.content) for m in said_so.pop().messages] == [*head, *flat]


plain = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=20)
literals = st.recursive(
    plain, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=4), max_leaves=15
)


@given(value=st.lists(literals))
def test_literals_are_read_as_python_reads_them(value: list[Any]) -> None:
    if all(c < "\ud800" or c > "\udfff" for c in repr(value)):
        assert literal(repr(value), "x") == value


@given(source=st.text(st.sampled_from("[]{}:,'\"\\ntx0123Nul-(+ "), max_size=40))
def test_other_literals_are_blamed(source: str) -> None:
    try:
        value = literal(source, "x")
    except RowError as error:
        assert error.reason == "LITERAL_INVALID"
    else:
        assert json.dumps(value)
