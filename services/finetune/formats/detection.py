"""Which format a row may be of, by what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from services.finetune.formats.pairs import PROMPTS


def has(row: Mapping[str, Any], *fields: str) -> bool:
    """A Parquet or CSV file gives every row all fields, some of them empty."""
    return all(row.get(field) is not None for field in fields)


def is_openai(row: Mapping[str, Any]) -> bool:
    return has(row, "messages") and not is_anthropic(row) and not is_preference(row)


def is_anthropic(row: Mapping[str, Any]) -> bool:
    tools = row.get("tools")
    if has(row, "messages") and isinstance(tools, list) and any(_in(tool, "input_schema") for tool in tools):
        return True
    blocks = [b for turn in _list(row, "messages") if isinstance(turn, Mapping) for b in _list(turn, "content")]
    return any(isinstance(b, Mapping) and b.get("type") in ("tool_use", "tool_result") for b in blocks)


def is_sharegpt(row: Mapping[str, Any]) -> bool:
    return _shared(row) and not is_llava(row) and not is_msagent(row) and not is_preference(row)


def is_llava(row: Mapping[str, Any]) -> bool:
    speakers = {str(t.get("from")) for t in _turns(row) if isinstance(t, Mapping)}
    return _shared(row) and has(row, "image") and speakers <= {"human", "gpt"} and not has(row, "tools")


def is_msagent(row: Mapping[str, Any]) -> bool:
    given = row.get("conversations")
    if isinstance(given, str):
        return given.lstrip().startswith("[")
    values = [str(t.get("value")) for t in _turns(row) if isinstance(t, Mapping)]
    return any("<|startofthink|>" in value for value in values)


def is_default(row: Mapping[str, Any]) -> bool:
    turns = _list(row, "conversation")
    if turns or has(row, "conversation"):
        return not _shared(row)
    return has(row, "input", "output") and not has(row, "instruction")


def is_prompt_completion(row: Mapping[str, Any]) -> bool:
    """A context beside would be lost, so that such a row is of no format until its columns are named."""
    return any(has(row, *pair) for pair in PROMPTS) and not has(row, "context") and not has(row, "system_prompt")


def is_preference(row: Mapping[str, Any]) -> bool:
    return has(row, "chosen", "rejected") or has(row, "preferred_output", "non_preferred_output")


def is_sql(row: Mapping[str, Any]) -> bool:
    return has(row, "question", "context", "answer") and "CREATE TABLE" in str(row["context"]).upper()


def is_colors(row: Mapping[str, Any]) -> bool:
    return has(row, "description", "color") and ":" in str(row["description"])


def is_oasst1(row: Mapping[str, Any]) -> bool:
    return has(row, "text") and "### Human:" in str(row["text"])


def is_text(row: Mapping[str, Any]) -> bool:
    return has(row, "text") and not is_oasst1(row)


def is_alpaca(row: Mapping[str, Any]) -> bool:
    return has(row, "instruction", "output")


def _shared(row: Mapping[str, Any]) -> bool:
    if not has(row, "conversations"):
        return any(_in(turn, "from") for turn in _list(row, "conversation"))
    return True


def _turns(row: Mapping[str, Any]) -> Sequence[Any]:
    return _list(row, "conversations") or _list(row, "conversation")


def _in(value: Any, field: str) -> bool:
    return isinstance(value, Mapping) and value.get(field) is not None


def _list(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = row.get(name)
    return value if isinstance(value, list | tuple) else []
