"""The loop: the model asks for tools, gets their results, and answers; in OpenAI's form or as ReAct texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quartet.inference.v1 import inference_pb2 as pb

from services.client.agent import MAX_RESULT_CHARS, Tool, ToolError
from services.finetune.formats import RowError
from services.finetune.formats.react import FINAL, instructions, literal

SYSTEM, USER, ASSISTANT, TOOL = pb.Message.SYSTEM, pb.Message.USER, pb.Message.ASSISTANT, pb.Message.TOOL
RESPONSE = "Response:"
ARGUMENTS = re.compile(r"Action:[ \t]*(?P<name>[^\n]+?)[ \t]*\n+Action Input:[ \t]*(?P<given>.*)", re.DOTALL)

Ask = Callable[[pb.ChatRequest], Iterator[pb.ChatResponse]]


@dataclass(frozen=True, slots=True)
class Step:
    """Something that happened on the way: the model's `thought`, or a call of a tool with its result."""

    thought: str = ""
    tool: str = ""
    arguments: str = ""
    result: str = ""
    failed: bool = False


class Loop:
    """`answer` puts a question; `request` holds the endpoint, the sampling, and what was said so far.

    At most `most_calls` calls are made for a question; then the model must answer. With `strict` it can write no call
    that breaks a tool's schema. `told` hears of each step.
    """

    def __init__(
        self,
        ask: Ask,
        request: pb.ChatRequest,
        tools: Sequence[Tool],
        most_calls: int,
        told: Callable[[Step], None],
        strict: bool = False,
    ) -> None:
        self._ask = ask
        self.request = request
        self._tools = {t.name: t for t in tools}
        self._most_calls = most_calls
        self._told = told
        self._strict = strict
        self._left = 0

    def answer(self, question: str) -> str:
        raise NotImplementedError

    def _said(self, request: pb.ChatRequest) -> pb.Message:
        """The answer as a turn; with its tokens the talk goes on from just what was said."""
        text, calls, ids = "", list[pb.ToolCall](), list[int]()
        for piece in self._ask(request):
            text += piece.text
            calls += piece.tool_calls
            ids += piece.token_ids
        return _turn(ASSISTANT, text, tool_calls=calls, token_ids=ids)

    def _do(self, name: str, given: str, arguments: Mapping[str, Any] | None) -> str:
        """Make a call; the result, or what went wrong, for the model."""
        result, failed = "", False
        try:
            if self._left <= 0:
                raise ToolError(f"not done: {self._most_calls} calls were made already; answer now")
            self._left -= 1
            if name not in self._tools:
                raise ToolError(f"there is no tool {name[:64]!r}; there are {', '.join(self._tools) or 'none'}")
            if arguments is None:
                raise ToolError("the arguments must be a JSON object")
            result = self._tools[name].call(arguments)
        except ToolError as error:
            result, failed = f"error: {error}", True
        if len(result) > MAX_RESULT_CHARS:
            result = result[:MAX_RESULT_CHARS] + " … (cut)"
        self._told(Step(tool=name, arguments=given, result=result, failed=failed))
        return result


class ToolLoop(Loop):
    """By calls of tools, for models whose templates have a place for them."""

    def answer(self, question: str) -> str:
        turns = self.request.messages
        turns.append(_turn(USER, question))
        self._left = self._most_calls
        while True:
            said = self._said(self._next())
            turns.append(said)
            text = said.content[0].text
            if not said.tool_calls:
                return text
            if text.strip():
                self._told(Step(thought=text.strip()))
            for call in said.tool_calls:
                result = self._do(call.name, call.arguments, json.loads(call.arguments))
                turns.append(_turn(TOOL, result, tool_call_id=call.id))

    def _next(self) -> pb.ChatRequest:
        request = pb.ChatRequest()
        request.CopyFrom(self.request)
        for tool in self._tools.values():
            parameters = json.dumps(tool.parameters, ensure_ascii=False)
            request.tools.add(name=tool.name, description=tool.description, parameters=parameters, strict=self._strict)
        if self._left <= 0:
            request.tool_choice.mode = pb.ToolChoice.NONE
        return request


class ReactLoop(Loop):
    """By texts, as MSAgent-Bench's data has them: Thought, Action, Action Input, Response, Final Answer."""

    def answer(self, question: str) -> str:
        turns = self.request.messages
        if not turns or turns[0].role != SYSTEM:
            turns.insert(0, _turn(SYSTEM, ""))
        if RESPONSE not in turns[0].content[0].text:
            turns[0].content[0].text = self._instructions() + turns[0].content[0].text
        turns.append(_turn(USER, f"{question}\n"))
        self._left = self._most_calls
        while True:
            said = self._said(self._next())
            text = said.content[0].text.partition("\n" + RESPONSE)[0].rstrip()  # results are not the model's to make up
            before, final, rest = text.rpartition(FINAL)
            called = ARGUMENTS.search(text) if not final and self._left > 0 else None
            said.content[0].text = text + ("\n\n" if called else "\n")  # as in the data
            turns.append(said)
            thought = (before if final else text[: called.start()] if called else "").strip()
            if thought.removeprefix("Thought:").strip():
                self._told(Step(thought=thought.removeprefix("Thought:").strip()))
            if called is None:
                return rest.strip()
            name, given = called["name"], called["given"].strip()
            result = self._do(name, given, self._read(name, given))
            # A result stands where a system text does, before a question of nothing, as in the data.
            turns.extend([_turn(SYSTEM, f"{RESPONSE}{result}\n"), _turn(USER, "")])

    def _instructions(self) -> str:
        told = {}
        for tool in self._tools.values():
            fields = {n: f.get("description", "") for n, f in tool.parameters.get("properties", {}).items()}
            told[tool.name] = tool.description + (f"\n输入参数: {fields}" if fields else "")
        return instructions(told)

    def _next(self) -> pb.ChatRequest:
        request = pb.ChatRequest()
        request.CopyFrom(self.request)
        request.sampling.stop.append(RESPONSE)
        if self._strict or self._left <= 0:
            request.sampling.grammar = self._grammar()
        return request

    def _grammar(self) -> str:
        """llguidance's Lark: a thought, then a call that keeps its tool's schema, if one is left, or the answer."""
        rules, calls = ['final: "Final Answer:" /(?s:.*)/', r"THOUGHT: /[^\n]*/"], []
        for n, tool in enumerate(self._tools.values() if self._left > 0 else ()):
            how = {**tool.parameters, "x-guidance": {"whitespace_flexible": False}}
            rules.append(f'call{n}: "Action:" {json.dumps(tool.name)} "\\nAction Input:" args{n} "\\n"')
            rules.append(f"args{n}: %json {json.dumps(how)}")
            calls.append(f"call{n}")
        return "\n".join([f'start: "Thought:" THOUGHT "\\n" ({" | ".join([*calls, "final"])})', *rules])

    def _read(self, name: str, given: str) -> Mapping[str, Any] | None:
        """Arguments as JSON, as Python writes them, or, where a tool wants one only, as a bare text."""
        given = given.removeprefix("```json").strip("`").strip()
        for read in (json.loads, lambda text: literal(text, "Action Input")):
            try:
                value = read(given)
            except (ValueError, RowError, RecursionError):
                continue
            if isinstance(value, Mapping):
                return value
        tool = self._tools.get(name)
        fields = list(tool.parameters.get("required", ())) if tool else []
        return {fields[0]: given} if len(fields) == 1 and given[:1] != "{" else None


FORMS: Mapping[str, type[Loop]] = {"openai": ToolLoop, "react": ReactLoop}


def _turn(role: Any, text: str, **more: Any) -> pb.Message:
    return pb.Message(role=role, content=[pb.Part(text=text)], **more)
