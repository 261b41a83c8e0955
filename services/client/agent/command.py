"""`quartet agent`: talk to a model that may use tools, and see every step that it takes."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence

from quartet.inference.v1 import inference_pb2 as pb

from services.client.agent import Tool
from services.client.agent.loop import FORMS, Step
from services.client.agent.servers import Servers
from services.client.agent.tools import Search, calculator, solver
from services.client.chat import endpoint_for, sampling, typed
from services.client.commands import connect
from services.client.show import out
from services.finetune.errors import InvalidArgument


def agent(a: Namespace) -> None:
    if a.max_calls < 0:
        raise InvalidArgument("--max-calls must not be negative", reason="SETTING_INVALID")
    own = builtin(a)
    with connect(a) as client, Servers(a.mcp) as servers, endpoint_for(client, a) as (endpoint, adapter):
        tools = distinct([*own, *servers.tools])
        request = pb.ChatRequest(
            endpoint=endpoint, adapter=adapter, sampling=pb.Sampling(**sampling(a), stop=a.stop_words)
        )
        if a.system:
            request.messages.add(role=pb.Message.SYSTEM, content=[pb.Part(text=a.system)])
        steps: list[Step] = []

        def told(step: Step) -> None:
            steps.append(step)
            if not a.json:
                print(shown(step), flush=True)

        loop = FORMS[a.form](client.inference.Chat, request, tools, a.max_calls, told, a.strict)
        for question in [a.message] if a.message else typed():
            if question == "RESET" and not a.message:
                del request.messages[1 if a.system else 0 :]
                continue
            answer = loop.answer(question)
            if a.json:
                out({"answer": answer, "steps": [_plain(s) for s in steps]})
                steps.clear()
            else:
                print(answer)


def builtin(a: Namespace) -> list[Tool]:
    """The tools that were asked for by name. InvalidArgument (SEARCH_INVALID)."""
    wanted = a.tool or ["calculate", "solve", *(["search"] if a.search else [])]
    if "search" in wanted and not a.search:
        raise InvalidArgument("the tool search wants --search URL: nothing is asked by itself", reason="SEARCH_INVALID")
    makes = {
        "calculate": calculator,
        "solve": solver,
        "search": lambda: Search(a.search, a.search_header_file).tool(),
        "none": None,
    }
    return [make() for name in wanted if (make := makes[name]) is not None]


def distinct(tools: Sequence[Tool]) -> Sequence[Tool]:
    """InvalidArgument (MCP_FAILED) if two have one name."""
    twice = [name for name, count in Counter(t.name for t in tools).items() if count > 1]
    if twice:
        raise InvalidArgument(
            f"two tools have the name {twice[0]}; leave one of them out by --tool", reason="MCP_FAILED"
        )
    return tools


def shown(step: Step) -> str:
    dim, plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    if step.thought:
        return f"{dim}  {step.thought}{plain}"
    result = step.result if len(step.result) <= 300 else step.result[:300] + " …"
    return f"{dim}  {step.tool} {step.arguments} -> {result}{plain}"


def _plain(step: Step) -> dict[str, object]:
    if step.thought:
        return {"thought": step.thought}
    try:
        arguments = json.loads(step.arguments)
    except ValueError:
        arguments = step.arguments
    return {"tool": step.tool, "arguments": arguments, "result": step.result, "failed": step.failed}
