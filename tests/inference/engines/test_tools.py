"""Chats with tools against an engine server and a real model, which says nonsense unless a form holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.finetune.errors import InvalidArgument
from services.finetune.tokenizer import Tokenizer
from tests.common.serving import refused
from tests.inference.engines.serving import engine_server
from tests.inference.wire import ASSISTANT, GREEDY, turns, whole
from tests.tiny import tiny_tokenizer

TOOL_TURN, REQUIRED = pb.Message.TOOL, pb.ToolChoice.REQUIRED
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = pb.Tool(name="weather", description="Of a city.", parameters=json.dumps(SCHEMA))
NOW = pb.Tool(name="now", parameters='{"type": "object", "additionalProperties": false}')
WARM = pb.Sampling(temperature=1, max_tokens=300, seed=5)


@pytest.fixture(scope="module", params=["hermes", "mistral"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceStub]:
    with engine_server(tmp_path_factory.mktemp(request.param), request.param) as channel:
        yield InferenceStub(channel)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceStub]:
    with engine_server(tmp_path_factory.mktemp("plain"), "") as channel:
        yield InferenceStub(channel)


def ask(stub: InferenceStub, said: Any = "hi", sampling: pb.Sampling = WARM, **more: Any) -> list[pb.ChatResponse]:
    more = {"tools": [WEATHER, NOW], **more}
    messages = said if isinstance(said, list) else turns(said)
    return list(stub.Chat(pb.ChatRequest(messages=messages, sampling=sampling, **more)))


def calls(answers: list[pb.ChatResponse]) -> list[pb.ToolCall]:
    return [c for a in answers for c in a.tool_calls]


def test_a_demanded_call_is_one(engine: InferenceStub) -> None:
    answers = ask(engine, tool_choice=pb.ToolChoice(mode=REQUIRED, name="weather"))
    (call,) = calls(answers)
    assert call.name == "weather" and len(call.id) == 9
    arguments = json.loads(call.arguments)
    assert (
        list(arguments) == ["city", "days"] and arguments["city"] in ("Paris", "Rome") and 0 <= arguments["days"] <= 9
    )
    assert "".join(a.text for a in answers) == ""
    assert answers[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS
    ids = [i for a in answers for i in a.token_ids]
    assert answers[-1].usage.completion_tokens == len(ids) > 30


def test_any_call_may_be_demanded(engine: InferenceStub) -> None:
    found = {
        call.name
        for seed in range(6)
        for call in calls(
            ask(
                engine,
                sampling=pb.Sampling(temperature=2, max_tokens=300, seed=seed),
                tool_choice=pb.ToolChoice(mode=REQUIRED, single=True),
            )
        )
    }
    assert found == {"weather", "now"}


def test_single_ends_with_the_first_call(engine: InferenceStub) -> None:
    many = [len(calls(ask(engine, tool_choice=pb.ToolChoice(mode=REQUIRED), tools=[NOW])))]
    one = ask(engine, tool_choice=pb.ToolChoice(mode=REQUIRED, single=True), tools=[NOW])
    assert len(calls(one)) == 1 <= many[0]
    assert one[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS


def test_free_answers_are_as_without_a_reader(engine: InferenceStub) -> None:
    # Random weights call nothing: all text comes, and it is what the tokens say.
    answers = ask(engine, sampling=GREEDY)
    assert not calls(answers)
    wanted = pb.Conversation(messages=turns("hi"), tools=[WEATHER, NOW])
    ids = engine.Tokenize(pb.TokenizeRequest(conversation=wanted)).token_ids
    bare = whole(engine.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids), sampling=GREEDY)))
    said = "".join(a.text for a in answers)
    assert said and bare[0].startswith(said)


def test_none_is_as_if_there_were_no_tools(engine: InferenceStub) -> None:
    with_none = ask(engine, sampling=GREEDY, tool_choice=pb.ToolChoice(mode=pb.ToolChoice.NONE))
    without = ask(engine, sampling=GREEDY, tools=[])
    assert [a.text for a in with_none[-1:]] == [a.text for a in without[-1:]]
    assert with_none[-1].usage == without[-1].usage


def test_strict_tools_keep_their_schema(engine: InferenceStub) -> None:
    strict = [pb.Tool(name="weather", parameters=WEATHER.parameters, strict=True), NOW]
    for seed in range(4):
        answers = ask(engine, sampling=pb.Sampling(temperature=1, max_tokens=40, seed=seed), tools=strict)
        for call in calls(answers):
            assert set(json.loads(call.arguments)) <= {"city", "days"}
        assert answers[-1].usage.completion_tokens > 0


def test_results_go_back_in_the_prompt(engine: InferenceStub, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_files(tiny_tokenizer(tmp_path / "t", ["[TOOL_CALLS]"]))
    (call,) = calls(ask(engine, tool_choice=pb.ToolChoice(mode=REQUIRED, name="weather")))
    said = [
        *turns("hi"),
        pb.Message(role=ASSISTANT, tool_calls=[call]),
        pb.Message(role=TOOL_TURN, content=[pb.Part(text="sunny")], tool_call_id=call.id),
    ]
    assert ask(engine, said, sampling=GREEDY)[-1].usage.completion_tokens > 0
    ids = engine.Tokenize(pb.TokenizeRequest(conversation=pb.Conversation(messages=said, tools=[WEATHER]))).token_ids
    text = tokenizer.decode(list(ids))
    assert "sunny" in text and '"city"' in text and text.index("weather") < text.index("sunny")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tools": [pb.Tool(name="a b")]}, "tools[0].name"),
        ({"tools": [NOW, NOW]}, "tools[1].name"),
        ({"tools": [pb.Tool(name="a", parameters="[")]}, "tools[0].parameters"),
        ({"tools": [pb.Tool(name="a", parameters="[]")]}, "tools[0].parameters"),
        ({"tools": [pb.Tool(name="a", parameters='{"type": "no"}', strict=True)]}, "tools[0].parameters"),
        ({"tools": [pb.Tool(name="a", parameters='{"type": "string"}', strict=True)]}, "tools[0].parameters"),
        ({"tools": [], "tool_choice": pb.ToolChoice(mode=REQUIRED)}, "tool_choice"),
        ({"tool_choice": pb.ToolChoice(mode=REQUIRED, name="x")}, "tool_choice.name"),
        ({"tool_choice": pb.ToolChoice(name="now")}, "tool_choice.name"),
    ],
)
def test_wrong_tools_are_blamed(engine: InferenceStub, change: dict[str, Any], field: str) -> None:
    with refused(InvalidArgument, "TOOLS_INVALID") as error:
        ask(engine, **change)
    assert [v.field for v in error[0].violations] == [field]


def test_forms_go_together_with_tools_as_far_as_they_can(engine: InferenceStub) -> None:
    with refused(InvalidArgument, "FORM_INVALID"):
        ask(engine, sampling=pb.Sampling(regex="a"))
    # A demanded call leaves no room for an answer.
    demanded = pb.ToolChoice(mode=REQUIRED, name="now")
    assert calls(ask(engine, sampling=pb.Sampling(regex="a", max_tokens=100), tool_choice=demanded))


RESULT = pb.Message(role=TOOL_TURN, content=[pb.Part(text="x")])
CALLS = pb.Message(role=ASSISTANT, tool_calls=[pb.ToolCall(id="abcdefghi", name="now", arguments="{}")])
OTHER = pb.Message(role=TOOL_TURN, tool_call_id="other")
BROKEN = pb.Message(role=ASSISTANT, tool_calls=[pb.ToolCall(name="now", arguments="{")])


@pytest.mark.parametrize(
    ("said", "reason", "field"),
    [
        ([RESULT], "ROLE_ORDER", "messages[1].role"),
        ([pb.Message(role=ASSISTANT), RESULT], "ROLE_ORDER", "messages[2].role"),
        ([CALLS], "ROLE_ORDER", "messages[1].role"),
        ([CALLS, *turns("so?")], "ROLE_ORDER", "messages[2].role"),
        ([CALLS, RESULT, RESULT], "TOOLS_INVALID", "messages[3].tool_call_id"),
        ([CALLS, OTHER], "TOOLS_INVALID", "messages[2].tool_call_id"),
        ([BROKEN, RESULT], "TOOLS_INVALID", "messages[1].tool_calls[0].arguments"),
    ],
)
def test_wrong_turns_are_blamed(plain: InferenceStub, said: list[pb.Message], reason: str, field: str) -> None:
    with refused(InvalidArgument, reason) as error:
        ask(plain, [*turns("hi"), *said])
    assert error[0].violations[0].field == field


def test_a_template_without_tools_refuses(plain: InferenceStub) -> None:
    with refused(InvalidArgument, "TOOLS_UNSUPPORTED") as error:
        ask(plain)
    assert "no place for them" in error[0].message
    with refused(InvalidArgument, "TOOLS_UNSUPPORTED"):
        ask(plain, [*turns("hi"), CALLS, RESULT], tools=[])
