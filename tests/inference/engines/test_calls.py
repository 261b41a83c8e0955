"""Calls of tools: the form is found in every template that has one, calls come back as they were rendered, in any pieces."""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from services.finetune.errors import InvalidArgument
from services.finetune.formats import Call, Conversation, Message
from services.finetune.templates import Template, load_template
from services.finetune.tokenizer import Tokenizer
from services.inference.engines.calls import CallForm, CallReader, find_form, grammar
from tests.inference.engines import call_templates
from tests.tiny import tiny_tokenizer

FORMS = [name for name in call_templates.CALLS if name != "xml"]
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("get", "find.all")
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "東京"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


@functools.cache
def known(name: str) -> tuple[Tokenizer, Template, CallForm]:
    tokenizer, template = call_templates.load(name, Path(tempfile.mkdtemp()) / name)
    return tokenizer, template, find_form(template, tokenizer.special_texts)


def rendered(template: Template, content: str, *calls: Call) -> str:
    """What a model that was trained with the template says, without its end."""
    turns = (Message("user", "q"), Message("assistant", content, calls=calls))
    text = "".join(p.text for p in template.pieces(Conversation(turns, TOOLS)) if p.trained)
    return text.removesuffix("<|im_end|>")


def read(form: CallForm, pieces: Sequence[str]) -> tuple[str, list[Call]]:
    reader, text, calls = CallReader(form, {"get", "find.all"}), "", list[Call]()
    for n, piece in enumerate(pieces):
        said, found = reader.push(piece, n == len(pieces) - 1)
        text += said
        calls += found
    return text, calls


def told(calls: Sequence[Call]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(c.name, c.arguments) for c in calls]


def cut(text: str, at: Sequence[int]) -> list[str]:
    ends = [0, *sorted(n % (len(text) + 1) for n in at), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(ends)]


def test_forms_are_seen_in_what_templates_render() -> None:
    found = {name: known(name)[2] for name in FORMS}
    assert {n: f.mark for n, f in found.items()} == {
        "hermes": "<tool_call>",
        "thinking": "<tool_call>",
        "mistral": "[TOOL_CALLS]",
        "mistral-bare": "[TOOL_CALLS]",
        "llama": "",
        "internlm2": "<|action_start|>",
        "deepseek": "<|calls_begin|>",
    }
    assert {n for n, f in found.items() if f.joint is None} == {"llama", "internlm2"}
    assert {n for n, f in found.items() if f.keys is None} == {"mistral-bare", "deepseek"}
    assert found["llama"].keys == found["internlm2"].keys == ("name", "parameters")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-99, 99)
    | st.text(max_size=8)
    | st.sampled_from(['"}', "</tool_call>", "{\\"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
PLAIN = st.text(st.characters(exclude_categories=["Cs", "Co", "Cc"], exclude_characters="<[{|"), max_size=20)


@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
def test_what_is_rendered_comes_back(name: str, data: st.DataObject) -> None:
    _, template, form = known(name)
    arguments = st.dictionaries(st.text(max_size=5), JSON, max_size=3)
    calls = [
        Call(data.draw(st.sampled_from(["get", "find.all"])), data.draw(arguments), "abcdefghi")
        for _ in range(1 if form.joint is None else data.draw(st.integers(1, 3)))
    ]
    content = data.draw(PLAIN).strip() if "content" in call_templates.CALLS[name] else ""
    try:
        text = rendered(template, content, *calls)
    except InvalidArgument as error:
        assert error.reason == "TEXT_INVALID"  # a special token's text inside a call
        return
    said, found = read(form, cut(text, data.draw(st.lists(st.integers(0, 500), max_size=8))))
    assert told(found) == told(calls)
    assert said.removeprefix("<think>\n\n</think>").strip() == content
    assert all(len(c.id) == 9 and c.id.isalnum() for c in found) and len({c.id for c in found}) == len(found)


@pytest.mark.parametrize("name", FORMS)
@given(data=st.data())
def test_no_text_is_lost_and_none_of_it_is_a_call(name: str, data: st.DataObject) -> None:
    form = known(name)[2]
    parts = st.sampled_from([form.mark, form.opening, form.closing, "{", "}", '{"name": "get"', " ", "\n", "a", '"'])
    text = "".join(data.draw(st.lists(parts, max_size=8)))
    said, found = read(form, cut(text, data.draw(st.lists(st.integers(0, 99), max_size=6))))
    assert not found or form.keys  # {"name": "get"} is a call without arguments
    if not found:
        assert said == text


CUT = '<tool_call>\n{"name": "get", "arguments": {"x": 1'
NO_NAME = '<tool_call>\n{"name": 1, "arguments": {}}\n</tool_call>'
LATE = 'See {"name": "get", "parameters": {}}'
ANN = '{"name": "Ann", "parameters": {}}'
BLANKS = 'I look.\n\n<tool_call>{"name":"get","arguments":{"x":1}}</tool_call>\n'
TWO = '[TOOL_CALLS][{"name":"get","arguments":{}},{"name":"get","arguments":{"y":2}}]'


@pytest.mark.parametrize(
    ("name", "text", "said", "calls"),
    [
        ("hermes", BLANKS, "I look.", [("get", {"x": 1})]),
        ("hermes", '<tool_call>\n{"name": "get", "arguments": {"x": "a\nb"}}', "", [("get", {"x": "a\nb"})]),
        ("hermes", "a <tool_call> is a mark", "a <tool_call> is a mark", []),
        ("hermes", CUT, CUT, []),
        ("hermes", NO_NAME, NO_NAME, []),
        ("hermes", '<tool_call>{"name": "lost", "arguments": {}}</tool_call> so', " so", [("lost", {})]),
        ("llama", '{"name": "get", "parameters": {}}', "", [("get", {})]),
        ("llama", ANN, ANN, []),
        ("llama", LATE, LATE, []),
        ("mistral", TWO, "", [("get", {}), ("get", {"y": 2})]),
        ("mistral-bare", "[TOOL_CALLS]get me[ARGS]{}", "[TOOL_CALLS]get me[ARGS]{}", []),
    ],
)
def test_what_models_write_otherwise(name: str, text: str, said: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    for pieces in ([text], list(text)):
        found = read(known(name)[2], pieces)
        assert (found[0], told(found[1])) == (said, calls)


def test_templates_without_a_form_refuse(tmp_path: Path) -> None:
    tokenizer, template = call_templates.load("xml", tmp_path / "xml")
    with pytest.raises(InvalidArgument, match="cannot be read back") as caught:
        find_form(template, tokenizer.special_texts)
    assert caught.value.reason == "TOOLS_UNSUPPORTED"
    plain = Tokenizer.from_files(tiny_tokenizer(tmp_path / "plain"))
    for name in ("tokenizer", "internlm2_chat"):
        with pytest.raises(InvalidArgument) as caught:
            find_form(load_template(name, plain), plain.special_texts)
        assert caught.value.reason == "TOOLS_UNSUPPORTED"


# ---------------------------------------------------------------------------------------------- forced forms


def takes(tokenizer: Tokenizer, source: str, text: str) -> bool:
    """Whether the grammar takes a text, special tokens as such, to its end."""
    data = json.loads(tokenizer._data)
    tokens = LLTokenizer(json.dumps(data), n_vocab=len(tokenizer.special_ids) + 256, eos_token=list(tokenizer.eos_ids))
    matcher = LLMatcher(tokens, LLMatcher.grammar_from_lark(source), log_level=0)
    assert not matcher.get_error(), matcher.get_error()
    ids = tokenizer.encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("name", FORMS)
def test_grammars_are_of_what_templates_render(name: str) -> None:
    tokenizer, template, form = known(name)
    tools: list[tuple[str, Mapping[str, Any]]] = [("get", SCHEMA), ("find.all", {"type": "object"})]
    forced = grammar(form, tools, tokenizer.special_ids, free=False, many=True)
    free = grammar(form, tools, tokenizer.special_ids, free=True, many=False)
    answer = '{"type": "object"}' if form.mark else ""
    either = grammar(form, tools, tokenizer.special_ids, free=True, many=True, answer=answer)
    good = Call("get", {"city": "東京", "days": 3}, "abcdefghi")
    bad = Call("get", {"city": "Rome", "days": 3}, "abcdefghi")
    one, wrong = (rendered(template, "", c).removeprefix("<think>\n\n</think>\n\n") for c in (good, bad))
    assert [takes(tokenizer, g, one) for g in (forced, free, either)] == [True] * 3
    assert [takes(tokenizer, g, wrong) for g in (forced, free, either)] == [False] * 3
    said = "It is [TOOL or <tool or {so}."
    assert [takes(tokenizer, g, said) for g in (forced, free, either)] == [False, True, not answer]
    assert not takes(tokenizer, forced, '{"a":1}')
    if form.mark:
        assert takes(tokenizer, either, '{"a":1}')
        assert takes(tokenizer, free, "I look.\n" + one) and not takes(tokenizer, free, "I look.\n" + wrong)
    if form.joint:
        two = rendered(template, "", good, Call("find.all", {}, "abcdefghi")).removeprefix("<think>\n\n</think>\n\n")
        assert takes(tokenizer, forced, two) and not takes(tokenizer, free, two)
