"""XTuner's msagent_react: MSAgent-Bench's conversations with tools, rewritten as ReAct texts in Chinese."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from services.finetune.formats import Conversation, Message, RowError
from services.finetune.formats.fields import Turns, is_object, is_text, text

MAX_LITERAL_CHARS = 1 << 20
MAX_LITERAL_DEPTH = 32

_THINK, _THINK_END = "<|startofthink|>", "<|endofthink|>"
_EXEC, _EXEC_END = "<|startofexec|>", "<|endofexec|>"
FINAL = "Final Answer:"
# A text in quotes of Python's, without the prefixes that would make it something else.
_TOKEN = re.compile(
    r"""\s*(?:([\[\]{}:,])|('(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|(-?\d+(?:\.\d+)?|True|False|None))""", re.DOTALL
)
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPES = {
    **dict(zip("abfnrtv", "\a\b\f\n\r\t\v", strict=True)),
    **{c: c for c in "\\'\""},
    "\n": "",
}
_CONSTANTS = {"True": True, "False": False, "None": None}
_SYSTEM = (
    "你是一个可以调用外部工具的助手，可以使用的工具包括：\n{tools}\n"
    "如果使用工具请遵循以下格式回复：\n```\n"
    "Thought:思考你当前步骤需要解决什么问题，是否需要使用工具\n"
    "Action:工具名称，你的工具必须从 [{names}] 选择\n"
    "Action Input:工具输入参数\n```\n工具返回按照以下格式回复：\n```\n"
    "Response:调用工具后的结果\n```\n如果你已经知道了答案，或者你不需要工具，"
    "请遵循以下格式回复\n```\n"
    "Thought:给出最终答案的思考过程\n"
    "Final Answer:最终答案\n```\n开始!\n"
)


def msagent_react(row: Mapping[str, Any]) -> Conversation:
    """`conversations`: a list of {from, value}, or the text of a Python literal of one."""
    given = row.get("conversations")
    if isinstance(given, str):
        given = literal(given, "conversations")
    if not isinstance(given, list | tuple) or len(given) < 2:
        message = "conversations must be a list of at least two turns, or its text as Python writes it"
        raise RowError("conversations", "FIELD_TYPE" if given is not None else "FIELD_MISSING", message)
    turns, system, question = Turns(), "", ""
    for n, item in enumerate(given):
        at = f"conversations[{n}]"
        turn = is_object(item, at, "from and value")
        role, value = text(turn, "from", f"{at}.from"), text(turn, "value", f"{at}.value")
        if role == "system":
            system += _system(value)
        elif role == "user":
            question += f"{value}\n"
        elif role == "assistant" and question:
            _ask(turns, system, question, f"{at}.value")
            system = question = ""
            _answer(turns, value, f"{at}.value")
        else:
            _refuse(role, at)
    return turns.checked("conversations")


def _ask(turns: Turns, system: str, question: str, at: str) -> None:
    if system:
        turns.add(Message("system", system), at)
    turns.add(Message("user", question), at)


def _refuse(role: str, at: str) -> None:
    if role == "assistant":
        raise RowError(f"{at}.value", "TURN_ORDER", "an answer without a question before it; remove it")
    message = f"unknown role {role[:40]!r}; use one of system, user, assistant"
    raise RowError(f"{at}.from", "ROLE_UNKNOWN", message)


def _answer(turns: Turns, value: str, at: str) -> None:
    said, *results = value.split(_EXEC)
    if len(results) > 1:
        raise RowError(at, "REACT_INVALID", f"{at} holds {_EXEC} twice; put each call into a turn of its own")
    thought, count = _thoughts(said, at)
    turns.add(Message("assistant", f"{thought}\n" if count else f"{FINAL}{thought}\n"), at)
    if results:
        response, final = _result(results[0], at)
        if final:
            # The tool's result stands where a system text does, before a question of nothing, as in XTuner.
            turns.add(Message("system", response), at)
            turns.add(Message("user", ""), at)
            turns.add(Message("assistant", final), at)


def _thoughts(said: str, at: str) -> tuple[str, int]:
    """`said` with each call as Thought, Action and Action Input, and how many there were."""
    found, start, count = "", 0, 0
    while (begin := said.find(_THINK, start)) >= 0 and (end := said.find(_THINK_END, begin)) >= 0:
        before = said[start:begin].strip()
        found += f"Thought:{before}\n" if before else ""
        call = is_object(_fenced(said[begin + len(_THINK) : end], at), at, "api_name and parameters")
        for name in ("api_name", "parameters"):
            if name not in call:
                raise RowError(at, "REACT_INVALID", f"a call in {at} has no {name}; add it")
        found += f"Action:{call['api_name']}\nAction Input:{call['parameters']}\n"
        start, count = end + len(_THINK_END), count + 1
    return found + said[start:], count


def _result(said: str, at: str) -> tuple[str, str]:
    """(the response, the final answer or "") of what follows a call."""
    inner, ended, after = said.partition(_EXEC_END)
    if not ended:
        raise RowError(at, "REACT_INVALID", f"{_EXEC} in {at} is not closed by {_EXEC_END}; add it")
    # XTuner's pattern leaves a last line's end outside.
    tail = "\n" if after.endswith("\n") and after.strip() else ""
    return f"Response:{_fenced(inner, at)}\n", f"{FINAL}{after.strip()}\n{tail}" if after.strip() else ""


def _fenced(given: str, at: str) -> Any:
    plain = given.replace("```JSON", "").replace("```", "").replace("\n", "")
    try:
        value = json.loads(plain)
        is_text(str(value), at)  # what Python cannot write, XTuner cannot either
        return value
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        message = f"a call or its result in {at} is no JSON: {str(error)[:100]}; mend it"
        raise RowError(at, "REACT_INVALID", message) from error


def _system(value: str) -> str:
    tools: dict[str, str] = {}
    for found in _objects(value):
        name, told = str(found["name"]), str(found["description"])
        try:
            given = {p["name"]: p["description"] for p in found["paths"][0]["parameters"]}
            told += f"\n输入参数: {given}"
        except (KeyError, IndexError, TypeError):
            pass  # a tool without parameters
        tools[name] = told
    return instructions(tools)


def instructions(tools: Mapping[str, str]) -> str:
    """The system text that tells of tools, (name, description)."""
    return _SYSTEM.replace("{tools}", str(tools)).replace("{names}", str(list(tools)))


def _objects(value: str) -> list[Mapping[str, Any]]:
    """The tools written anywhere in a text: JSON objects with a name and a description."""
    decoder, found, at = json.JSONDecoder(), list[Mapping[str, Any]](), 0
    while (at := value.find("{", at)) >= 0:
        try:
            given, end = decoder.raw_decode(value, at)
        except (ValueError, RecursionError):
            given, end = {}, at + 1
        tool = "name" in given and "description" in given
        if tool:
            found.append(given)
        at = end if tool else at + 1
    return found


def literal(source: str, at: str) -> Any:
    """The value of a Python literal of lists, objects, texts and numbers; nothing is ever run.

    RowError (LITERAL_INVALID) for anything else, for a longer text than MAX_LITERAL_CHARS or a deeper one than
    MAX_LITERAL_DEPTH.
    """
    if len(source) > MAX_LITERAL_CHARS:
        raise RowError(at, "LITERAL_INVALID", f"{at} is longer than {MAX_LITERAL_CHARS} characters; write it as JSON")
    value, end = _literal(is_text(source, at), 0, 0, at)
    if source[end:].strip():
        raise _bad(source, end, at)
    return value


def _literal(source: str, start: int, depth: int, at: str) -> tuple[Any, int]:
    token = _TOKEN.match(source, start)
    if token is None or depth > MAX_LITERAL_DEPTH:
        raise _bad(source, start, at)
    sign, quoted, plain = token.groups()
    if sign == "[":
        return _items(source, token.end(), depth, at)
    if sign == "{":
        return _entries(source, token.end(), depth, at)
    if sign:
        raise _bad(source, start, at)
    try:
        if quoted:
            return _ESCAPE.sub(_escaped, quoted[1:-1]), token.end()
        return _CONSTANTS[plain] if plain in _CONSTANTS else json.loads(plain), token.end()
    except ValueError as error:  # a number of too many digits, no such character
        raise _bad(source, start, at) from error


def _escaped(found: re.Match[str]) -> str:
    octal, code, plain = found.groups()
    if octal or code:
        return chr(int(octal, 8) if octal else int(code[1:], 16))
    return _ESCAPES.get(plain, "\\" + plain)


def _items(source: str, start: int, depth: int, at: str) -> tuple[list[Any], int]:
    found: list[Any] = []
    while (end := _sign(source, start, "]")) < 0:
        if found:
            start = _demand(source, start, ",", at)
            if (end := _sign(source, start, "]")) >= 0:
                break
        value, start = _literal(source, start, depth + 1, at)
        found.append(value)
    return found, end


def _entries(source: str, start: int, depth: int, at: str) -> tuple[dict[str, Any], int]:
    found: dict[str, Any] = {}
    while (end := _sign(source, start, "}")) < 0:
        if found:
            start = _demand(source, start, ",", at)
            if (end := _sign(source, start, "}")) >= 0:
                break
        name, after = _literal(source, start, depth + 1, at)
        if not isinstance(name, str):
            raise _bad(source, start, at)
        found[name], start = _literal(source, _demand(source, after, ":", at), depth + 1, at)
    return found, end


def _sign(source: str, start: int, sign: str) -> int:
    """Where `sign`, if it comes next, ends; else -1."""
    token = _TOKEN.match(source, start)
    return token.end() if token is not None and token[1] == sign else -1


def _demand(source: str, start: int, sign: str, at: str) -> int:
    if (end := _sign(source, start, sign)) < 0:
        raise _bad(source, start, at)
    return end


def _bad(source: str, start: int, at: str) -> RowError:
    message = f"{at} is no list as Python writes it, from character {start + 1} on: {source[start : start + 20]!r}"
    return RowError(at, "LITERAL_INVALID", f"{message}; write it as JSON")
