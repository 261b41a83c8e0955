"""Tools and calls as OpenAI, Anthropic and ShareGPT data write them, to one form: OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.finetune.formats import Call, RowError, Tool
from services.finetune.formats.fields import from_json, is_object, is_text, optional, text

MAX_DEPTH = 64
"""Levels of lists and objects in a tool's definition or a call's arguments."""


def definitions(row: Mapping[str, Any]) -> tuple[Tool, ...]:
    """`tools`, or OpenAI's older `functions`: a list, or a text of JSON with one."""
    name = "functions" if row.get("tools") is None and row.get("functions") is not None else "tools"
    given = row.get(name)
    if given is None or given in ("", "[]"):
        return ()
    if isinstance(given, str):
        given = from_json(given, name, "TOOL_INVALID")
    if not isinstance(given, list | tuple):
        raise RowError(name, "FIELD_TYPE", f"{name} must be a list of tool definitions")
    return tuple(_definition(tool, f"{name}[{n}]") for n, tool in enumerate(given))


def _definition(given: Any, at: str) -> Tool:
    tool = is_object(given, at, "the name of a tool")
    inner = tool.get("function")
    if inner is None:  # Anthropic's and ShareGPT's, and OpenAI's functions
        schema = {"parameters": tool["input_schema"]} if tool.get("input_schema") is not None else {}
        kept = {k: v for k, v in tool.items() if k not in ("input_schema", "type", "function", "cache_control")}
        inner, tool = {**kept, **schema}, {"type": "function"}
    function = is_object(inner, f"{at}.function", "the name of a tool")
    _named(function, at)
    _check_texts(function, at)
    return {**tool, "type": tool.get("type") or "function", "function": _present(function)}


def _present(value: Any) -> Any:
    """Without fields that are null: a Parquet file gives every object of a column the fields of all."""
    if isinstance(value, Mapping):
        return {k: _present(v) for k, v in value.items() if v is not None}
    return [_present(v) for v in value] if isinstance(value, list | tuple) else value


def _check_texts(value: Any, at: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise RowError(at[:200], "TOOL_INVALID", f"the tool is nested deeper than {MAX_DEPTH} levels; flatten it")
    if isinstance(value, str):
        is_text(value, at)
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            is_text(name, at)
            _check_texts(inner, f"{at}.{str(name)[:40]}", depth + 1)
    elif isinstance(value, list | tuple):
        for n, inner in enumerate(value):
            _check_texts(inner, f"{at}[{n}]", depth + 1)


def _named(function: Mapping[str, Any], at: str) -> str:
    name = text(function, "name", f"{at}.name")
    if not name.strip():
        raise RowError(f"{at}.name", "TOOL_INVALID", f"{at}.name is empty; name the tool")
    return name


def calls(turn: Mapping[str, Any], at: str) -> tuple[Call, ...]:
    """An assistant's `tool_calls`, or OpenAI's older `function_call`."""
    given = turn.get("tool_calls")
    if not given:
        older = turn.get("function_call")
        return () if older is None else (call(older, f"{at}.function_call"),)
    if not isinstance(given, list | tuple):
        raise RowError(f"{at}.tool_calls", "FIELD_TYPE", f"{at}.tool_calls must be a list")
    return tuple(call(one, f"{at}.tool_calls[{n}]") for n, one in enumerate(given))


def call(given: Any, at: str) -> Call:
    """{id, function: {name, arguments}} or {name, arguments}; the arguments an object, or a text of JSON with one."""
    outer = is_object(given, at, "a function's name and arguments")
    inner = (
        outer if outer.get("function") is None else is_object(outer["function"], f"{at}.function", "name, arguments")
    )
    path = at if inner is outer else f"{at}.function"
    return Call(_named(inner, path), _arguments(inner, "arguments", path), optional(outer, "id", f"{at}.id"))


def used(block: Mapping[str, Any], at: str) -> Call:
    """Anthropic's tool_use block."""
    return Call(_named(block, at), _arguments(block, "input", at), optional(block, "id", f"{at}.id"))


def stated(value: str, at: str) -> tuple[Call, ...]:
    """ShareGPT's function_call turn: a text of JSON with one call or a list of them."""
    given = from_json(value, at, "TOOL_CALL_INVALID")
    several: Sequence[Any] = given if isinstance(given, list) else [given]
    if not several:
        raise RowError(at, "TOOL_CALL_INVALID", f"{at} holds no call; add one or make it an answer")
    return tuple(call(one, at) for one in several)


def _arguments(function: Mapping[str, Any], name: str, at: str) -> Mapping[str, Any]:
    value = function.get(name)
    path = f"{at}.{name}"
    if isinstance(value, str):
        value = from_json(value, path, "TOOL_CALL_INVALID") if value.strip() else {}
    if value is not None and not isinstance(value, Mapping):
        raise RowError(
            path, "TOOL_CALL_INVALID", f"{path} must be an object, or its JSON; write {{}} if there are none"
        )
    _check_texts(value or {}, path)
    found: Mapping[str, Any] = value or {}
    return found
