"""Questions and answers: a row with a field for each to a conversation of one turn; running texts; MOSS.

What differs between formats is a row of `PAIRS`. XTuner's formats put a system text before their rows.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from services.finetune.formats import Conversation, Message, RowError
from services.finetune.formats.fields import Turns, is_object, optional, text
from services.finetune.formats.rows import joined

SYSTEMS: Mapping[str, str] = tomllib.loads(Path(__file__).with_name("systems.toml").read_text("utf-8"))
"""XTuner's system texts by XTuner's names."""

_MOSS_MARKS = (
    *("<|Human|>", "<|Inner Thoughts|>", "<|Commands|>", "<|Results|>", "<|MOSS|>"),
    *("<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>"),
)
_RESULTS, _RESULTS_END = "<|Results|>:", "<eor>\n"


@dataclass(frozen=True, slots=True)
class Pair:
    """`question` are fields, joined by lines, all but `needed` of which may be empty or missing."""

    question: tuple[str, ...]
    answer: str
    needed: str
    system: str = ""


PAIRS: Mapping[str, Pair] = {
    "alpaca_zh": Pair(("instruction_zh", "input_zh"), "output_zh", "instruction_zh"),
    "arxiv": Pair(("abstract",), "title", "abstract", SYSTEMS["arxiv_gentile"]),
    "code_alpaca": Pair(("prompt",), "completion", "prompt", SYSTEMS["coder"]),
    "crime_kg_assitant": Pair(("input",), "output", "input", SYSTEMS["lawyer"]),
    "law_reference": Pair(("question",), "answer", "question", SYSTEMS["lawyer"]),
    "medical": Pair(("instruction", "input"), "output", "instruction", SYSTEMS["medical"]),
    "sql": Pair(("context", "question"), "answer", "question", SYSTEMS["sql"]),
    "stack_exchange": Pair(("question",), "response", "question"),
    "tiny_codes": Pair(("prompt",), "response", "prompt", SYSTEMS["coder"]),
}
PROMPTS = (
    *(("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response")),
    *(("query", "response"), ("instruction", "response")),
)
"""The names that questions and answers have in data of today."""


def pair(name: str, row: Mapping[str, Any]) -> Conversation:
    """A row of the format `name` of PAIRS."""
    form = PAIRS[name]
    parts = [text(row, f, f) if f == form.needed else optional(row, f, f) for f in form.question]
    return _one(row, "\n".join(p for p in parts if p), form.needed, form.answer, form.system)


def converter(name: str) -> partial[Conversation]:
    return partial(pair, name)


def _one(row: Mapping[str, Any], question: str, asked: str, answer: str, system: str) -> Conversation:
    turns = Turns()
    if system:
        turns.add(Message("system", system), asked)
    _add_history(turns, row)
    turns.add(Message("user", question), asked)
    turns.add(Message("assistant", text(row, answer, answer)), answer)
    return turns.checked(asked)


def alpaca(row: Mapping[str, Any]) -> Conversation:
    """`history`, a list of [question, answer], comes before."""
    question, answer = text(row, "instruction", "instruction"), text(row, "output", "output")
    if answer.strip() == "<nooutput>":  # Alpaca's own mark
        raise RowError("output", "ANSWER_EMPTY", "output is <nooutput>: there is nothing to learn; remove the row")
    turns = Turns()
    _add_history(turns, row)
    turns.add(Message("user", joined(question, optional(row, "input", "input"))), "instruction")
    turns.add(Message("assistant", answer), "output")
    turns.put_system(row)
    return turns.checked("instruction")


def _add_history(turns: Turns, row: Mapping[str, Any]) -> None:
    for n, said in enumerate(_history(row)):
        turns.add(Message("user", said[0]), f"history[{n}][0]")
        turns.add(Message("assistant", said[1]), f"history[{n}][1]")


def _history(row: Mapping[str, Any]) -> Sequence[Sequence[str]]:
    given = row.get("history")
    if given is None or given == "":
        return []
    if not isinstance(given, list | tuple):
        raise RowError("history", "FIELD_TYPE", "history must be a list of [question, answer]")
    for n, said in enumerate(given):
        if not isinstance(said, list | tuple) or len(said) != 2:
            raise RowError(f"history[{n}]", "FIELD_TYPE", f"history[{n}] must be [question, answer]")
        for k in (0, 1):
            text({"": said[k]}, "", f"history[{n}][{k}]")
    return given


def openorca(row: Mapping[str, Any]) -> Conversation:
    return _one(
        row, text(row, "question", "question"), "question", "response", optional(row, "system_prompt", "system_prompt")
    )


def colors(row: Mapping[str, Any]) -> Conversation:
    """The question is what follows the first colon of the description."""
    _, colon, question = text(row, "description", "description").partition(":")
    if not colon:
        raise RowError("description", "QUESTION_EMPTY", "description has no colon, behind which the question stands")
    return _one(row, question.strip(), "description", "color", SYSTEMS["colorist"])


def prompt_completion(row: Mapping[str, Any]) -> Conversation:
    """The first pair of PROMPTS that the row has; each a text, or as in TRL a list of messages."""
    from services.finetune.formats.rows import openai

    asked, answer = next((p for p in PROMPTS if all(row.get(f) is not None for f in p)), PROMPTS[0])
    question, said = row.get(asked), row.get(answer)
    if not isinstance(question, list | tuple) and not isinstance(said, list | tuple):
        return _one(row, text(row, asked, asked), asked, answer, optional(row, "system", "system"))
    messages: list[Any] = []
    paths: list[str] = []
    for name, role, value in ((asked, "user", question), (answer, "assistant", said)):
        several = isinstance(value, list | tuple)
        messages += value if several and isinstance(value, list | tuple) else [{"role": role, "content": value}]
        paths += [f"{name}[{n}]" for n in range(len(value))] if several and isinstance(value, list | tuple) else [name]
    try:
        return openai({**row, "messages": messages})
    except RowError as error:
        raise RowError(_renamed(error.field, paths), error.reason, error.message) from error


def _renamed(field: str, paths: Sequence[str]) -> str:
    """messages[3].content as a path in the row that the messages were taken from."""
    number, _, rest = field.removeprefix("messages[").partition("]")
    return f"{paths[int(number)]}{rest}" if number.isdigit() and int(number) < len(paths) else field


def running_text(row: Mapping[str, Any]) -> Conversation:
    """The text as it is, ended by the tokenizer's EOS."""
    return Conversation((Message("text", _some_text(row), ends=True),))


def pretrain(row: Mapping[str, Any]) -> Conversation:
    """XTuner's: the text without white space around it, and without an end."""
    return Conversation((Message("text", _some_text(row).strip()),))


def _some_text(row: Mapping[str, Any]) -> str:
    value = text(row, "text", "text")
    if not value.strip():
        raise RowError("text", "ANSWER_EMPTY", "text is empty: there is nothing to learn; fill it in")
    return value


def moss_sft(row: Mapping[str, Any]) -> Conversation:
    """MOSS frames its rows itself, so they are running texts: all is learned but the instruction and tools' results."""
    turns = [Message("text", text(row, "meta_instruction", "meta_instruction"), False, marks=_MOSS_MARKS)]
    chat = is_object(row.get("chat"), "chat", "turn_1, turn_2 and so on")
    count = row.get("num_turns")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= 10_000:
        raise RowError("num_turns", "FIELD_TYPE", "num_turns must be the number of turns in chat")
    for n in range(1, count + 1):
        at = f"chat.turn_{n}"
        turn = is_object(chat.get(f"turn_{n}"), at, "Human, Inner Thoughts, Commands, Tool Responses and MOSS")
        for name in turn:
            turns += _moss_part(name, text(turn, name, f"{at}.{str(name)[:40]}"), f"{at}.{str(name)[:40]}")
    if len(turns) == 1:
        raise RowError("chat.turn_1", "ANSWER_MISSING", "chat.turn_1 is empty: there is nothing to learn; fill it in")
    return Conversation(tuple(turns))


def _moss_part(name: str, value: str, at: str) -> list[Message]:
    if name != "Tool Responses":
        return [Message("text", value, marks=_MOSS_MARKS)]
    if not value.startswith(_RESULTS) or not value.endswith(_RESULTS_END):
        message = f"{at} must begin with {_RESULTS} and end with <eor> and a line's end"
        raise RowError(at, "FIELD_UNSUPPORTED", message)
    inner = value[len(_RESULTS) : -len(_RESULTS_END)]
    parts = [Message("text", _RESULTS, marks=_MOSS_MARKS), Message("text", inner, False)]
    return [*parts, Message("text", _RESULTS_END, marks=_MOSS_MARKS)]
