"""The loop against engine servers: one that says what is written down for it, and a real model that is held to its forms."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1 import inference_pb2_grpc as rpc

from services.client.__main__ import main
from services.client.agent import Tool, schema
from services.client.agent.loop import ReactLoop, Step, ToolLoop
from services.client.agent.tools import calculator
from services.client.client import Client
from services.finetune.formats.react import msagent_react
from tests.inference.engines.serving import NAME, engine_server

Said = str | list[tuple[str, Mapping[str, Any]]]


class Scripted(rpc.InferenceServicer):
    """Gives its answers one after another: texts, or calls (name, arguments). `asked` are the requests."""

    def __init__(self, answers: Sequence[Said]) -> None:
        self._answers = list(answers)
        self.asked: list[pb.ChatRequest] = []

    def GetEndpoint(self, request: pb.GetEndpointRequest, context: Any) -> pb.Endpoint:
        return pb.Endpoint(name=request.name, state=pb.Endpoint.READY)

    def Chat(self, request: pb.ChatRequest, context: Any) -> Iterator[pb.ChatResponse]:
        self.asked.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, str):
            for word in answer.split(" "):
                yield pb.ChatResponse(text=word + " ", token_ids=[len(word)])
            yield pb.ChatResponse(finish_reason=pb.FINISH_REASON_STOP)
            return
        for n, (name, arguments) in enumerate(answer):
            yield pb.ChatResponse(tool_calls=[pb.ToolCall(id=f"call{n}", name=name, arguments=json.dumps(arguments))])
        yield pb.ChatResponse(finish_reason=pb.FINISH_REASON_TOOL_CALLS)


Serve = Callable[..., tuple[Scripted, str]]


@pytest.fixture()
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A server of scripted answers, and its address."""
    server = grpc.server(ThreadPoolExecutor(4))

    def start(*answers: Said) -> tuple[Scripted, str]:
        scripted = Scripted(answers)  # type: ignore[abstract]  # the loop calls no other rpc
        rpc.add_InferenceServicer_to_server(scripted, server)
        server.add_insecure_port(f"unix:{tmp_path}/a")
        server.start()
        return scripted, f"unix:{tmp_path}/a"

    yield start
    server.stop(None).wait()


ECHO = Tool("echo", "Says it again.", schema({"text": {"type": "string"}}), lambda a: f"<{a['text']}>")
LONG = Tool("long", "Says much.", schema({}), lambda a: "x" * 50_000)


def loop(kind: Any, address: str, most_calls: int = 3, strict: bool = False) -> tuple[Any, list[Step]]:
    client, steps = Client(address), list[Step]()
    request = pb.ChatRequest(endpoint=NAME, sampling=pb.Sampling(max_tokens=200, temperature=1, seed=4))
    return kind(client.inference.Chat, request, [calculator(), ECHO, LONG], most_calls, steps.append, strict), steps


def test_calls_are_made_and_their_results_told(serve: Serve) -> None:
    scripted, address = serve(
        [("calculate", {"expression": "6*7"}), ("echo", {"text": "hm"})], [("long", {})], "It is 42."
    )
    talk, steps = loop(ToolLoop, address)
    assert talk.answer("6 times 7?").strip() == "It is 42."
    assert [(s.tool, s.result[:4], s.failed) for s in steps] == [
        ("calculate", "42", False),
        ("echo", "<hm>", False),
        ("long", "xxxx", False),
    ]
    last = scripted.asked[-1]
    assert [m.role for m in last.messages] == [2, 3, 4, 4, 3, 4]
    assert [m.tool_call_id for m in last.messages if m.role == pb.Message.TOOL] == ["call0", "call1", "call0"]
    assert len(last.messages[-1].content[0].text) < 20_000
    assert talk.request.messages[-1].token_ids == [2, 2, 3]
    # Three calls were allowed and made: now it must answer.
    assert [r.tool_choice.mode for r in scripted.asked] == [pb.ToolChoice.AUTO] * 2 + [pb.ToolChoice.NONE]
    assert [t.name for t in scripted.asked[0].tools] == ["calculate", "echo", "long"]


def test_what_goes_wrong_is_told_to_the_model(serve: Serve) -> None:
    wrong: list[tuple[str, Mapping[str, Any]]] = [
        ("calculate", {"expression": "1/0"}),
        ("weather", {}),
        ("echo", {"text": "a"}),
    ]
    scripted, address = serve([*wrong, ("echo", {"text": "b"})], "So be it.")
    talk, steps = loop(ToolLoop, address)
    talk.answer("?")
    assert [s.failed for s in steps] == [True, True, False, True]
    told = [m.content[0].text for m in scripted.asked[-1].messages if m.role == pb.Message.TOOL]
    assert "division by zero" in told[0] and "there is no tool 'weather'" in told[1] and "3 calls were made" in told[3]


def test_texts_of_react_are_as_in_msagents_data(serve: Serve) -> None:
    scripted, address = serve(
        "Thought:I must compute.\nAction:calculate\nAction Input:{'expression': '6*7'}\nResponse:",
        "Thought:I know it.\nFinal Answer:It is 42.",
        "Just so.",
    )
    talk, steps = loop(ReactLoop, address)
    assert talk.answer("6 times 7?") == "It is 42."
    assert [(s.thought, s.tool, s.result) for s in steps] == [
        ("I must compute.", "", ""),
        ("", "calculate", "42"),
        ("I know it.", "", ""),
    ]
    tools = json.dumps(
        [
            {"name": t.name, "description": t.description, "paths": [{"parameters": [
                {"name": n, "description": f.get("description", "")} for n, f in t.parameters["properties"].items()
            ]}]}
            for t in (calculator(), ECHO)
        ]
    )  # fmt: skip
    call = '<|startofthink|>```JSON\n{"api_name": "calculate", "parameters": {"expression": "6*7"}}```<|endofthink|>'
    value = f"I must compute.{call}<|startofexec|>```JSON\n42```<|endofexec|>It is 42."
    row = [
        {"from": "system", "value": tools},
        {"from": "user", "value": "6 times 7?"},
        {"from": "assistant", "value": value},
    ]
    learned = msagent_react({"conversations": row}).messages
    second = [(m.role, m.content[0].text) for m in scripted.asked[1].messages]
    roles = {pb.Message.SYSTEM: "system", pb.Message.USER: "user", pb.Message.ASSISTANT: "assistant"}
    assert [(roles[r], t) for r, t in second][1:] == [(m.role, m.content) for m in learned[1:-1]]
    assert second[0][1].startswith(learned[0].content.partition("：")[0])
    assert "Response:" in scripted.asked[0].sampling.stop
    assert talk.answer("Sure?") == "Just so."


def test_react_calls_that_are_none_are_told_to_the_model(serve: Serve) -> None:
    scripted, address = serve(
        "Action:echo\nAction Input: just this",
        "Action:calculate\nAction Input:[1]",
        "Action:nothing\nAction Input:{}",
        "Thought:enough\nFinal Answer:done",
    )
    talk, steps = loop(ReactLoop, address)
    assert talk.answer("?") == "done"
    assert next((s.result, s.failed) for s in steps if s.tool) == ("<just this>", False)
    assert [s.failed for s in steps if s.tool] == [False, True, True]
    assert "Final Answer" in scripted.asked[-1].sampling.grammar and "echo" not in scripted.asked[-1].sampling.grammar


def test_the_verb_shows_every_step(
    serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, address = serve([("calculate", {"expression": "2+2"})], "Four.", [("solve", {"equations": []})], "None.")
    where = ["--endpoint", address, "-m", "2+2?"]
    with pytest.raises(SystemExit) as left:
        main(["agent", "e", *where])
    assert not left.value.code
    assert capsys.readouterr().out.split("\n")[:2] == ['  calculate {"expression": "2+2"} -> 4', "Four. "]
    with pytest.raises(SystemExit):
        main(["agent", "e", "--json", "--tool", "solve", *where])
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == "None. " and told["steps"][0]["failed"] and told["steps"][0]["tool"] == "solve"
    with pytest.raises(SystemExit) as left:
        main(["agent", "e", "--tool", "search", *where])
    assert left.value.code == 65 and "--search" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("e")
    with engine_server(home, "hermes"):
        yield f"unix:{home}/s"


def test_a_real_model_is_held_to_reacts_form(model: str) -> None:
    talk, steps = loop(ReactLoop, model, most_calls=1, strict=True)
    talk.request.sampling.max_tokens = 80
    assert isinstance(talk.answer("2+2?"), str)
    assert all(s.tool in ("", "calculate", "echo", "long") for s in steps)
    # Whatever it says, it says it in the form.
    said = [m.content[0].text for m in talk.request.messages if m.role == pb.Message.ASSISTANT]
    assert said and all(text.startswith("Thought:") for text in said)


def test_a_real_model_calls_and_gets_results(model: str) -> None:
    class Demanding(ToolLoop):
        """A model of random weights calls nothing of itself: its first turn is demanded to be a call."""

        def _next(self) -> pb.ChatRequest:
            request = super()._next()
            if self._left == self._most_calls:
                request.tool_choice.mode, request.tool_choice.single = pb.ToolChoice.REQUIRED, True
            return request

    talk, steps = loop(Demanding, model)
    assert isinstance(talk.answer("2+2?"), str)
    assert [s.tool in ("calculate", "echo", "long") for s in steps if s.tool] == [True]
    roles = [m.role for m in talk.request.messages]
    assert roles == [pb.Message.USER, pb.Message.ASSISTANT, pb.Message.TOOL, pb.Message.ASSISTANT]
