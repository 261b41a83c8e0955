"""Tools on OpenAI's wire: definitions, choices and calls, to our messages and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quartet.inference.v1 import inference_pb2 as pb

from services.gateway.errors import bad

MODES = {"auto": pb.ToolChoice.AUTO, "none": pb.ToolChoice.NONE, "required": pb.ToolChoice.REQUIRED}


def read_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """`tools` and `tool_choice` of a ChatRequest. InvalidArgument (FIELD_INVALID, FIELD_UNSUPPORTED)."""
    given, parallel = body.get("tools", []), body.get("parallel_tool_calls", True)
    if not isinstance(given, list):
        raise bad("tools", "must be a list")
    if not isinstance(parallel, bool):
        raise bad("parallel_tool_calls", "must be true or false")
    tools = [_tool(f"tools[{n}]", t) for n, t in enumerate(given)]
    choice = _choice(body.get("tool_choice", "auto"))
    choice.single = not parallel
    return {"tools": tools, "tool_choice": choice} if tools or choice.mode == pb.ToolChoice.REQUIRED else {}


def _tool(where: str, given: Any) -> pb.Tool:
    kind = given.get("type") if isinstance(given, dict) else None
    if kind != "function":
        raise bad(where, "must be of type function; other tools are not supported here", "FIELD_UNSUPPORTED")
    function = given.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise bad(f"{where}.function", "must be an object with a name")
    unknown = set(function) - {"name", "description", "parameters", "strict"}
    if unknown:
        raise bad(f"{where}.function.{min(unknown)}", "is no field of a function", "FIELD_UNKNOWN")
    told, schema, strict = (function.get(name) for name in ("description", "parameters", "strict"))
    if not isinstance(told, str | None):
        raise bad(f"{where}.function.description", "must be a text")
    if not isinstance(schema, dict | None):
        raise bad(f"{where}.function.parameters", "must be a JSON schema, an object")
    if not isinstance(strict, bool | None):
        raise bad(f"{where}.function.strict", "must be true or false")
    # As text, in which its keys keep their order.
    text = "" if schema is None else json.dumps(schema, ensure_ascii=False)
    return pb.Tool(name=function["name"], description=told or "", parameters=text, strict=bool(strict))


def _choice(given: Any) -> pb.ToolChoice:
    if isinstance(given, str) and given in MODES:
        return pb.ToolChoice(mode=MODES[given])
    named = given.get("function") if isinstance(given, dict) and given.get("type") == "function" else None
    if not isinstance(named, dict) or not isinstance(named.get("name"), str) or not named["name"]:
        raise bad("tool_choice", f"must be one of {', '.join(MODES)}, or name a function")
    return pb.ToolChoice(mode=pb.ToolChoice.REQUIRED, name=named["name"])


def read_calls(where: str, given: Any) -> list[pb.ToolCall]:
    """An assistant's tool_calls. InvalidArgument (FIELD_INVALID)."""
    if not isinstance(given, list):
        raise bad(where, "must be a list")
    found = []
    for n, call in enumerate(given):
        function = call.get("function") if isinstance(call, dict) else None
        parts = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
        name, arguments = parts
        if not (isinstance(name, str) and isinstance(arguments, str) and isinstance(call.get("id", ""), str)):
            raise bad(f"{where}[{n}]", "must have an id, and a function with name and arguments, all texts")
        found.append(pb.ToolCall(id=call.get("id", ""), name=name, arguments=arguments))
    return found


def call_objects(calls: Sequence[pb.ToolCall], first: int | None = None) -> list[dict[str, Any]]:
    """Calls as a message has them; those of a stream are counted from `first`."""
    return [
        {
            **({"index": first + n} if first is not None else {}),
            "id": call.id,
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for n, call in enumerate(calls)
    ]
