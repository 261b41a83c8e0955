"""Every format: what its rows become, how it is found, and what is blamed in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.finetune.errors import InvalidArgument
from services.finetune.formats import FORMATS, Conversation, Problem, Row, RowError, format_named, read_rows, sniff

Fields = dict[str, Any]

WEATHER = {"name": "weather", "description": "tells it", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": WEATHER}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
OPENAI_TOOLS: Fields = {
    "messages": [
        ASK,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        SAY,
    ],
    "tools": [TOOL],
}
OLD_FUNCTIONS = {
    "messages": [
        ASK,
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"role": "function", "name": "weather", "content": "rain"},
        SAY,
    ],
    "functions": [WEATHER],
}
USE = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]}
ANTHROPIC = {
    "system": [{"type": "text", "text": "s"}],
    "tools": [{"name": "weather", "description": "tells it", "input_schema": WEATHER["parameters"]}],
    "messages": [ASK, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}, SAY],
}
SHAREGPT_TOOLS = {
    "conversations": [
        HUMAN,
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "rain"},
        GPT,
    ],
    "tools": json.dumps([WEATHER]),
    "system": "s",
}
TALK = "user assistant"
BOXED: Fields = {"image": "a.jpg", "sents": "a dog", "bbox": [10, 20, 30, 40], "width": 200, "height": 100}
PREFERRED: Fields = {
    "input": {"messages": [ASK], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [SAY],
    "non_preferred_output": [{**SAY, "content": "b"}],
}

GOOD: list[tuple[str, Fields, str]] = [
    ("openai", {"messages": [{"role": "developer", "content": "s"}, ASK, SAY]}, "system user assistant"),
    ("openai", {"messages": [ASK, SAY], "system": "s"}, "system user assistant"),
    ("openai", {"messages": [SAY, ASK, SAY, ASK]}, TALK),
    ("openai", {"messages": [{**ASK, "content": [{"type": "text", "text": "q"}]}, SAY]}, TALK),
    ("openai", {"messages": [ASK, SAY, {"role": "system", "content": "s"}, ASK, SAY]}, f"{TALK} system {TALK}"),
    ("openai", OPENAI_TOOLS, "user assistant tool assistant"),
    ("openai", OLD_FUNCTIONS, "user assistant tool assistant"),
    ("anthropic", ANTHROPIC, "system user assistant tool assistant"),
    ("sharegpt", {"conversations": [HUMAN, GPT], "system": "s"}, "system user assistant"),
    ("sharegpt", {"conversations": [ASK, SAY]}, TALK),
    ("sharegpt", {"conversations": [GPT, {"from": "user", "value": "q"}, {"from": "chatgpt", "value": "a"}]}, TALK),
    ("sharegpt", {"conversation": [HUMAN, GPT]}, TALK),
    ("sharegpt", {"conversations": [HUMAN, GPT], "images": [], "tools": "[]", "system": ""}, TALK),
    ("llava", {"image": "", "conversations": [HUMAN, GPT]}, TALK),
    ("sharegpt", SHAREGPT_TOOLS, "system user assistant tool assistant"),
    ("llava", {"image": "a.jpg", "conversations": [{**HUMAN, "value": "q\n<image>"}, GPT]}, TALK),
    ("llava", {"image": "a.jpg", "conversation": [{**HUMAN, "value": "<image>q"}, GPT]}, TALK),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["b", "c"]], "system": "s"}, f"system {TALK} {TALK}"),
    ("default", {"conversation": [{"input": "q", "output": "a"}]}, TALK),
    ("default", {"input": "q", "output": "a"}, TALK),
    ("default", {"conversation": [{"input": "", "output": "a"}]}, "text"),
    ("openorca", {"system_prompt": "s", "question": "q", "response": "a"}, "system user assistant"),
    ("sql", {"context": "create table t (a int)", "question": "q", "answer": "a"}, "system user assistant"),
    ("arxiv", {"abstract": "q", "title": "a"}, "system user assistant"),
    ("colors", {"description": "Red: a red", "color": "#f00"}, "system user assistant"),
    ("alpaca_zh", {"instruction_zh": "q", "input_zh": None, "output_zh": "a"}, TALK),
    ("prompt_completion", {"prompt": "q", "completion": "a"}, TALK),
    ("prompt_completion", {"question": "q", "answer": "a", "system": "s"}, "system user assistant"),
    ("prompt_completion", {"query": "q", "response": "a", "history": [["b", "c"]]}, f"{TALK} {TALK}"),
    ("prompt_completion", {"prompt": [ASK], "completion": [SAY]}, TALK),
    ("prompt_completion", {"prompt": [ASK], "completion": "a"}, TALK),
    ("oasst1", {"text": "### Human: q### Assistant: a### Human: r"}, TALK),
    ("text", {"text": "q a"}, "text"),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, TALK),
    ("preference", {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "b"}]}, TALK),
    ("preference", {"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "b"}]}, TALK),
    ("preference", {"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "b"}}, TALK),
    ("preference", {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b", "system": "s"}, f"system {TALK}"),
    ("preference", PREFERRED, TALK),
    ("msagent_react", {"conversations": "[{'from': 'user', 'value': 'q'}, {'from': 'assistant', 'value': 'a'}]"}, TALK),
    ("moss_sft", {"meta_instruction": "s", "num_turns": 1, "chat": {"turn_1": {"MOSS": "a"}}}, "text text"),
]  # fmt: skip


def written(tmp_path: Path, *rows: Fields) -> list[tuple[str, Path]]:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return [("a.jsonl", path)]


def roles(conversation: Conversation) -> str:
    return " ".join(m.role for m in conversation.messages)


@pytest.mark.parametrize(("format", "row", "wanted"), GOOD)
def test_rows_are_found_out_and_read(tmp_path: Path, format: str, row: Fields, wanted: str) -> None:
    files = written(tmp_path, row)
    assert sniff(files)[0] == format
    (found,) = read_rows(files, format)
    assert isinstance(found, Row), found
    assert roles(found.conversation) == wanted


NAMED = [
    ("preference_chosen", {"prompt": "q", "chosen": "a", "rejected": "b"}),
    ("pretrain", {"text": " q "}),
    ("wizardlm", {"conversations": [HUMAN, GPT]}),
    ("llava_image_only", {"image": "a.jpg", "conversations": [{**HUMAN, "value": "<image> q"}, GPT]}),
    ("refcoco", BOXED),
    ("refcoco_inverse", BOXED),
    ("code_alpaca", {"prompt": "q", "completion": "a"}),
    ("tiny_codes", {"prompt": "q", "response": "a"}),
    ("crime_kg_assitant", {"input": "q", "output": "a"}),
    ("law_reference", {"question": "q", "answer": "a"}),
    ("medical", {"instruction": "q", "input": "", "output": "a"}),
    ("stack_exchange", {"question": "q", "response": "a"}),
]


def test_refcoco_asks_where_and_what(tmp_path: Path) -> None:
    said = {}
    for name in ("refcoco", "refcoco_inverse"):
        (row,) = read_rows(written(tmp_path, BOXED), name)
        assert isinstance(row, Row) and row.conversation.images == ("a.jpg",)
        said[name] = [m.content for m in row.conversation.messages]
    assert said["refcoco"][0].startswith("<image>\n[refer] ") and "a dog" in said["refcoco"][0]
    assert said["refcoco"][1] == "{<5><20><20><60>}" and said["refcoco_inverse"][1] == "a dog"
    assert (
        said["refcoco_inverse"][0].startswith("<image>\n[identify] ")
        and said["refcoco"][1] in said["refcoco_inverse"][0]
    )
    rows = [{**BOXED, "image": f"{n}.jpg"} for n in range(50)]
    asked = {
        r.conversation.messages[0].content for r in read_rows(written(tmp_path, *rows), "refcoco") if isinstance(r, Row)
    }
    assert len(asked) == 7
    for bad in ({"bbox": [1, 2]}, {"bbox": [1, 2, 500, 4]}, {"width": 0}, {"height": "9"}):
        (problem,) = read_rows(written(tmp_path, {**BOXED, **bad}), "refcoco")
        assert isinstance(problem, Problem) and (problem.field, problem.reason) == ("bbox", "FIELD_TYPE")


def test_the_tutorials_spelling_is_tolerated_and_told(tmp_path: Path) -> None:
    turns = [{**HUMAN, "value": "what?\n<image>"}, GPT]
    rows = [{"id": 1, "image": "a.jpg", name: turns} for name in ("conversation", "conversations")]
    files = written(tmp_path, *rows)
    assert sniff(files)[0] == "llava"
    wrong, right = (row for row in read_rows(files, "llava") if isinstance(row, Row))
    assert wrong.conversation == right.conversation and "`conversations`" in wrong.tolerated and not right.tolerated
    assert wrong.conversation.messages[0].content == "<image>\nwhat?"


def test_the_table_is_whole() -> None:
    """Every format has a row in this file."""
    assert {f for f, _, _ in GOOD} | {f for f, _ in NAMED} == set(FORMATS)
    assert {f.name for f in FORMATS.values() if f.fits is None} == {f for f, _ in NAMED}
    assert format_named("crime_kg_assitan").name == "crime_kg_assitant", "XTuner's own key"


@pytest.mark.parametrize(("format", "row"), NAMED)
def test_formats_by_name_only(format: str, row: Fields) -> None:
    conversation = format_named(format).convert(row)
    assert any(m.trained for m in conversation.messages if m.role in ("assistant", "text"))


def test_tools_of_all_kinds_are_one_kind() -> None:
    for format, row in (
        ("openai", OPENAI_TOOLS),
        ("openai", OLD_FUNCTIONS),
        ("anthropic", ANTHROPIC),
        ("sharegpt", SHAREGPT_TOOLS),
    ):
        conversation = format_named(format).convert(row)
        assert conversation.tools == (TOOL,), format
        asked = next(m for m in conversation.messages if m.calls)
        assert [(c.name, c.arguments) for c in asked.calls] == [("weather", {"city": "Oslo"})]
        assert next(m for m in conversation.messages if m.role == "tool").content == "rain"


def test_pairs_keep_the_worse_answer_and_learn_the_better_only_if_asked() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    stored = format_named("preference").convert(row)
    assert not any(m.trained for m in stored.messages if m.role == "assistant")
    assert [m.content for m in stored.rejected] == ["b"]
    assert [m.trained for m in format_named("preference_chosen").convert(row).messages] == [True, True]


def test_answers_are_left_unlearned_by_any_of_the_three_words() -> None:
    for word, no in (("loss", False), ("weight", 0), ("train", False), ("loss", "False")):
        row = {"messages": [ASK, {**SAY, word: no}, ASK, SAY]}
        assert [m.trained for m in format_named("openai").convert(row).messages] == [True, False, True, True]


def test_images_stand_in_order_and_one_mark_moves_to_the_front() -> None:
    turns = [{**HUMAN, "value": "what <image>"}, GPT, {**HUMAN, "value": "<image> or <image>?"}, GPT]
    found = format_named("sharegpt").convert({"conversations": turns, "images": ["a.jpg", "b/c.png", "d.png"]})
    assert found.images == ("a.jpg", "b/c.png", "d.png")
    assert [m.content for m in found.messages] == ["<image>\nwhat", "a", "<image> or <image>?", "a"]


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
AGENT = {"from": "user", "value": "q"}
MOSS = {"meta_instruction": "s", "num_turns": 1, "chat": {"turn_1": {"MOSS": "a"}}}


def called(**changes: Any) -> Fields:
    call = {"name": "weather", "arguments": "{}", **changes}
    return {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": call}]}]}


BAD: list[tuple[str, Fields, str, str]] = [
    ("openai", {"messages": [ASK, {"role": "tool", "content": "x"}, SAY]}, "messages[1].content", "TURN_ORDER"),
    ("openai", called(arguments="{"), "messages[1].tool_calls[0].function.arguments", "TOOL_CALL_INVALID"),
    ("openai", called(arguments="[]"), "messages[1].tool_calls[0].function.arguments", "TOOL_CALL_INVALID"),
    ("openai", called(arguments={"a": "\ud800"}), "messages[1].tool_calls[0].function.arguments.a", "TEXT_INVALID"),
    ("openai", called(name=" "), "messages[1].tool_calls[0].function.name", "TOOL_INVALID"),
    ("openai", called(name=None), "messages[1].tool_calls[0].function.name", "FIELD_MISSING"),
    ("openai", {**OPENAI_TOOLS, "tools": [{"type": "function"}]}, "tools[0].name", "FIELD_MISSING"),
    ("openai", {**OPENAI_TOOLS, "tools": "["}, "tools", "TOOL_INVALID"),
    ("openai", {**OPENAI_TOOLS, "tools": 3}, "tools", "FIELD_TYPE"),
    ("openai", {"messages": [ASK, {**SAY, "train": "no"}]}, "messages[1].train", "FIELD_TYPE"),
    ("openai", {"messages": [{"role": "system", "content": "s"}]}, "messages[0].content", "TURN_ORDER"),
    (
        "anthropic",
        {"messages": [{**ASK, "content": [{"type": "image"}]}, SAY]},
        "messages[0].content[0]",
        "PART_UNSUPPORTED",
    ),
    ("anthropic", {"messages": [{**ASK, "content": [USE]}, SAY]}, "messages[0].content[0]", "PART_UNSUPPORTED"),
    ("anthropic", {"messages": [ASK, {**SAY, "content": []}]}, "messages[1].content", "FIELD_TYPE"),
    (
        "sharegpt",
        {"conversations": [HUMAN, {"from": "function_call", "value": "{"}]},
        "conversations[1].value",
        "TOOL_CALL_INVALID",
    ),
    ("sharegpt", {"conversations": [HUMAN, GPT], "image": "a.jpg"}, "image", "IMAGE_COUNT"),
    ("sharegpt", {"conversations": [HUMAN, GPT], "image": "../a.jpg"}, "image", "IMAGE_PATH"),
    ("sharegpt", {"conversations": [HUMAN, GPT], "images": ["https://x/a.jpg"]}, "images[0]", "IMAGE_PATH"),
    ("sharegpt", {"conversations": [HUMAN, GPT], "images": [3]}, "images[0]", "FIELD_TYPE"),
    ("llava", {"conversations": [{"from": "system", "value": "s"}]}, "conversations[0].from", "ROLE_UNKNOWN"),
    ("llava_image_only", {"image": "a.jpg", "conversations": [HUMAN, GPT]}, "conversations[0].value", "IMAGE_COUNT"),
    ("alpaca", {"instruction": "q", "output": "a", "history": ["x"]}, "history[0]", "FIELD_TYPE"),
    ("alpaca", {"instruction": "q", "output": "a", "history": [["x", 3]]}, "history[0][1]", "FIELD_TYPE"),
    ("default", {"input": "q"}, "output", "FIELD_MISSING"),
    ("default", {"input": "q", "output": "a", "output_with_loss": False}, "output", "NOTHING_TRAINED"),
    ("oasst1", {"text": "Hello"}, "text", "TURN_ORDER"),
    ("oasst1", {"text": "Hi ### Human: q### Assistant: a"}, "text", "TURN_ORDER"),
    ("text", {"text": " "}, "text", "ANSWER_EMPTY"),
    ("colors", {"description": "red", "color": "#f00"}, "description", "QUESTION_EMPTY"),
    ("sql", {"context": "", "question": "q"}, "answer", "FIELD_MISSING"),
    (
        "prompt_completion",
        {"prompt": [ASK], "completion": [{**SAY, "content": 1}]},
        "completion[0].content",
        "FIELD_TYPE",
    ),
    ("prompt_completion", {"prompt": [{"role": "x"}], "completion": "a"}, "prompt[0].role", "ROLE_UNKNOWN"),
    ("preference", {**PAIR, "rejected": "a"}, "rejected", "PREFERENCE_EQUAL"),
    ("preference", {**PREFERRED, "input": {"messages": [{"role": "x"}]}}, "input.messages[0].role", "ROLE_UNKNOWN"),
    (
        "preference",
        {**PREFERRED, "non_preferred_output": [{"role": "assistant"}]},
        "non_preferred_output[0].content",
        "FIELD_MISSING",
    ),
    ("preference", {**PREFERRED, "input": "q"}, "input", "FIELD_TYPE"),
    ("preference", {**PAIR, "rejected": [{"role": "user", "content": "r"}, SAY]}, "rejected", "PREFERENCE_PROMPTS"),
    ("preference", {**PAIR, "chosen": [ASK]}, "chosen[0].content", "ANSWER_MISSING"),
    ("preference", {"chosen": "a", "rejected": "b"}, "prompt", "FIELD_MISSING"),
    ("preference", {**PAIR, "chosen": 3}, "chosen", "FIELD_TYPE"),
    ("msagent_react", {"conversations": "[__import__('os')]"}, "conversations", "LITERAL_INVALID"),
    ("msagent_react", {"conversations": "[" * 10_000}, "conversations", "LITERAL_INVALID"),
    ("msagent_react", {"conversations": "[{'from': 'user'}] + [1]"}, "conversations", "LITERAL_INVALID"),
    ("msagent_react", {"conversations": [AGENT]}, "conversations", "FIELD_TYPE"),
    ("msagent_react", {"conversations": [AGENT, {"from": "x", "value": "a"}]}, "conversations[1].from", "ROLE_UNKNOWN"),
    (
        "msagent_react",
        {"conversations": [AGENT, {"from": "assistant", "value": "<|startofthink|>{}<|endofthink|>"}]},
        "conversations[1].value",
        "REACT_INVALID",
    ),
    (
        "msagent_react",
        {"conversations": [AGENT, {"from": "assistant", "value": "a<|startofexec|>{}"}]},
        "conversations[1].value",
        "REACT_INVALID",
    ),
    ("moss_sft", {**MOSS, "num_turns": "1"}, "num_turns", "FIELD_TYPE"),
    ("moss_sft", {**MOSS, "num_turns": 2}, "chat.turn_2", "FIELD_TYPE"),
    ("moss_sft", {**MOSS, "chat": {"turn_1": {"MOSS": 1}}}, "chat.turn_1.MOSS", "FIELD_TYPE"),
    (
        "moss_sft",
        {**MOSS, "chat": {"turn_1": {"Tool Responses": "4"}}},
        "chat.turn_1.Tool Responses",
        "FIELD_UNSUPPORTED",
    ),
    ("moss_sft", {**MOSS, "chat": {"turn_1": {}}}, "chat.turn_1", "ANSWER_MISSING"),
]


@pytest.mark.parametrize(("format", "row", "field", "reason"), BAD)
def test_the_field_is_blamed(format: str, row: Fields, field: str, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        format_named(format).convert(row)
    assert (caught.value.field, caught.value.reason) == (field, reason), caught.value.message
    assert caught.value.message.encode()


def test_a_result_names_a_call_that_was_made() -> None:
    messages = [dict(m) for m in OPENAI_TOOLS["messages"]]
    messages[2]["tool_call_id"] = "c2"
    with pytest.raises(RowError, match="c1") as caught:
        format_named("openai").convert({"messages": messages})
    assert (caught.value.field, caught.value.reason) == ("messages[2].content", "TOOL_CALL_UNKNOWN")


def nested(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value]
    return value


def test_depth_is_bounded(tmp_path: Path) -> None:
    tools = [{"name": "weather", "parameters": {"x": nested(100)}}]
    (deep,) = read_rows(written(tmp_path, {"messages": [ASK, SAY], "tools": tools}), "openai")
    assert isinstance(deep, Problem) and (deep.field[:5], deep.reason) == ("tools", "TOOL_INVALID")


def test_what_is_too_deep_for_a_format_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python's stack ends depends on who calls; the row is blamed wherever that is."""

    def deeper(row: Any) -> Conversation:
        return deeper(row)

    monkeypatch.setitem(FORMATS, "text", replace(FORMATS["text"], convert=deeper))
    (deep,) = read_rows(written(tmp_path, {"text": "x"}), "text")
    assert isinstance(deep, Problem) and deep.reason == "JSON_TOO_DEEP"


def test_many_rows_decide_where_one_does_not(tmp_path: Path) -> None:
    odd, row = {"foo": 1}, {"input": "q", "output": "a"}
    assert sniff(written(tmp_path, odd, row, row)) == ("default", "2 of the first 3 rows have input and output")
    both = {"instruction": "q", "output": "a", "text": "q a"}
    format, reason = sniff(written(tmp_path, both, both))
    assert format == "alpaca" and "text too" in reason
    format, _ = sniff(written(tmp_path, both, {"text": "x"}, {"text": "y"}))
    assert format == "text", "what fits more rows wins"


def test_a_context_is_not_lost(tmp_path: Path) -> None:
    files = written(tmp_path, {"question": "q", "context": "c", "answer": "a"})
    with pytest.raises(InvalidArgument, match="map its columns") as caught:
        sniff(files)
    assert caught.value.reason == "FORMAT_UNDETECTED"
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    assert sniff(files, columns)[0] == "alpaca"
    (found,) = read_rows(files, "alpaca", columns)
    assert isinstance(found, Row) and found.conversation.messages[0].content == "q\nc"


def test_columns_are_blamed_under_their_own_names(tmp_path: Path) -> None:
    columns = {"instruction": "frage", "output": "antwort"}
    files = written(
        tmp_path, {"frage": "q", "antwort": "a"}, {"frage": "q", "antwort": 3}, {"frage": "q", "antwrt": "a"}
    )
    good, typed, absent = read_rows(files, "alpaca", columns)
    assert isinstance(good, Row) and isinstance(typed, Problem) and isinstance(absent, Problem)
    assert (typed.field, typed.reason) == ("antwort", "FIELD_TYPE") and "output" in typed.message
    assert (absent.field, absent.reason) == ("antwort", "COLUMN_MISSING") and "antwrt" in absent.message
    with pytest.raises(InvalidArgument, match="did you mean 'instruction'") as caught:
        list(read_rows(files, "alpaca", {"instrction": "frage"}))
    assert caught.value.reason == "COLUMN_UNKNOWN"
    with pytest.raises(InvalidArgument) as missing:
        sniff(files[:1], {"instruction": "nowhere"})
    assert missing.value.reason == "COLUMN_MISSING"


def test_columns_reach_into_lists(tmp_path: Path) -> None:
    files = written(tmp_path, {"dialog": [ASK, {"role": "robot", "content": "a"}]})
    (bad,) = read_rows(files, "openai", {"messages": "dialog"})
    assert isinstance(bad, Problem) and bad.field == "dialog[1].role"
