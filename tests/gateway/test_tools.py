"""Tools on OpenAI's wire: read strictly, and used by the unmodified openai SDK in front of a real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import InvalidArgument
from services.gateway.wire import read_chat
from tests.gateway.web import gateway
from tests.inference.engines.serving import engine_server

HI: ChatCompletionMessageParam = {"role": "user", "content": "hi"}
SCHEMA = {
    "type": "object",
    "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 9}, "city": {"enum": ["Paris", "Rome"]}},
    "required": ["days", "city"],
    "additionalProperties": False,
}
WEATHER: ChatCompletionToolParam = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"days": 1}'}}


def asked(**more: Any) -> pb.ChatRequest:
    (request,) = read_chat({"model": "e", "messages": [HI], **more}).requests("workspaces/w")
    assert isinstance(request, pb.ChatRequest)
    return request


def test_tools_and_turns_are_passed_on() -> None:
    told = {"role": "tool", "tool_call_id": "abcdefghi", "content": "sunny"}
    request = asked(
        messages=[HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, told],
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
    )
    assert json.loads(request.tools[0].parameters) == SCHEMA
    assert list(json.loads(request.tools[0].parameters)["properties"]) == ["days", "city"]
    wanted = pb.ToolChoice(mode=pb.ToolChoice.REQUIRED, name="weather", single=True)
    assert request.tool_choice == wanted
    assert request.messages[1].tool_calls[0] == pb.ToolCall(id="abcdefghi", name="weather", arguments='{"days": 1}')
    assert (request.messages[2].role, request.messages[2].tool_call_id) == (pb.Message.TOOL, "abcdefghi")
    assert not asked(tools=[], tool_choice="auto").HasField("tool_choice")


@pytest.mark.parametrize(
    ("change", "param", "reason"),
    [
        ({"tools": {}}, "tools", "FIELD_INVALID"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]", "FIELD_UNSUPPORTED"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "FIELD_INVALID"),
        ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, "tools[0].function.x", "FIELD_UNKNOWN"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": []}}]},
            "tools[0].function.parameters",
            "FIELD_INVALID",
        ),
        ({"tool_choice": "any"}, "tool_choice", "FIELD_INVALID"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls", "FIELD_INVALID"),
        ({"messages": [HI, {"role": "assistant", "tool_calls": [{}]}]}, "messages[1].tool_calls[0]", "FIELD_INVALID"),
        ({"messages": [{"role": "tool", "tool_call_id": 1, "content": ""}]}, "messages[0].tool_call_id", "FIELD_INVALID"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        asked(**change)
    assert caught.value.reason == reason and caught.value.violations[0].field == param


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    home = tmp_path_factory.mktemp("h")
    with (
        engine_server(home, "hermes"),
        gateway(f"unix:{home}/s") as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def test_a_call_and_its_result(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="e", messages=[HI], tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=200
    )
    choice = made.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "weather"
    assert list(json.loads(call.function.arguments)) == ["days", "city"]
    turns: list[Any] = [HI, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = client.chat.completions.create(model="e", messages=turns, tools=[WEATHER], max_tokens=5, temperature=0)
    assert answer.usage is not None and made.usage is not None
    assert answer.usage.prompt_tokens > made.usage.prompt_tokens


def test_streamed_calls_are_put_together_by_the_sdk(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", "function": {**WEATHER["function"], "strict": True}}]
    with client.chat.completions.stream(
        model="e", messages=[HI], tools=tools, tool_choice="required", max_tokens=150, n=2, seed=3, temperature=0.7
    ) as stream:
        kinds = {event.type for event in stream}
        made = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    for choice in made.choices:
        assert choice.message.tool_calls
        for call in choice.message.tool_calls:
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome") and len(call.id) == 9


def test_errors_of_tools_are_the_sdks(client: openai.OpenAI) -> None:
    twice = [WEATHER, WEATHER]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="e", messages=[HI], tools=twice)
    assert (caught.value.param, caught.value.code) == ("tools[1].name", "tools_invalid")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="e", messages=[HI], tool_choice="required")
    assert caught.value.param == "tool_choice"
