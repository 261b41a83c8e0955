"""Rows of any format become conversations; what cannot be read is blamed by file, row and field.

A format is one row of `FORMATS`: adding one is adding a line and its `convert` function in rows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.errors import InvalidArgument, nearest


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user or assistant; an assistant's turn is learned if `trained`."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns: system (optional, first), then user and assistant in turn."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A good row and where it stands: `row` counts from 1, lines in .jsonl and .csv, else rows."""

    file: str
    row: int
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class Problem:
    """A bad row: which field, why, and what would mend it."""

    file: str
    row: int
    field: str
    reason: str
    message: str


class RowError(ValueError):
    """Raised by a format's `convert`: the field to blame and why."""

    def __init__(self, field: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.field, self.reason, self.message = field, reason, message


@dataclass(frozen=True, slots=True)
class Format:
    """How one kind of row is read. A row is taken for this format when it has all of `fields`."""

    name: str
    description: str
    fields: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Conversation]


def _table() -> dict[str, Format]:
    from services.finetune.formats import rows

    formats = [
        Format("openai", "messages: [{role, content}], roles system, user, assistant", ("messages",), rows.openai),
        Format("sharegpt", "conversations: [{from, value}], from human or gpt", ("conversations",), rows.sharegpt),
        Format("alpaca", "instruction, input (may be empty), output", ("instruction", "output"), rows.alpaca),
        Format("default", "conversation: [{system, input, output}]", ("conversation",), rows.default),
    ]
    return {f.name: f for f in formats}


# rows.py imports the classes above, so the table comes after them.
FORMATS: Mapping[str, Format] = _table()


def format_named(name: str) -> Format:
    """A format by name. InvalidArgument (FORMAT_UNKNOWN) naming the nearest."""
    formats = FORMATS
    if name not in formats:
        raise InvalidArgument(f"unknown format {name!r}{nearest(name, list(formats))}", reason="FORMAT_UNKNOWN")
    return formats[name]


def detect(row: Mapping[str, Any]) -> tuple[str, str]:
    """(format, reason) by the fields of one row. InvalidArgument (FORMAT_UNDETECTED)."""
    for f in FORMATS.values():
        if all(field in row for field in f.fields):
            return f.name, "the first row has " + " and ".join(f.fields)
    known = "; ".join(f"{f.name}: {f.description}" for f in FORMATS.values())
    has = ", ".join(repr(str(name)[:40]) for name in list(row)[:20])
    raise InvalidArgument(
        f"no format fits a row with the fields {has}; known are {known}",
        reason="FORMAT_UNDETECTED",
    )


def sniff(files: Iterable[tuple[str, Path]]) -> tuple[str, str]:
    """(format, reason) from the first readable row. InvalidArgument (FORMAT_UNDETECTED, DATASET_EMPTY)."""
    from services.finetune.formats.containers import raw_rows

    problem: Problem | None = None
    for file, path in files:
        for raw in raw_rows(file, path):
            if not isinstance(raw, Problem):
                return detect(raw[1])
            problem = problem or raw
    if problem is not None:
        raise InvalidArgument(
            f"no row can be read; the first fails at files[{problem.file}].rows[{problem.row}]: {problem.message}",
            reason="FORMAT_UNDETECTED",
        )
    raise InvalidArgument("the files hold no row", reason="DATASET_EMPTY")


def read_rows(
    files: Iterable[tuple[str, Path]], format: str, *, carried: Collection[str] | None = None
) -> Iterator[Row | Problem]:
    """Every row of the files (path in the artifact, path on disk), good or bad, in order; what holds no rows is passed over.
    With `carried`, all paths of the artifact, an image that a row names must be one of them."""
    from services.finetune.formats.carried import lost_image
    from services.finetune.formats.containers import is_row_file, raw_rows

    convert = format_named(format).convert
    for file, path in files:
        for raw in raw_rows(file, path) if is_row_file(file) else ():
            if isinstance(raw, Problem):
                yield raw
                continue
            number, fields = raw
            try:
                if carried is not None and (lost := lost_image(file, fields, carried)) is not None:
                    raise lost
                yield Row(file, number, convert(fields))
            except RowError as error:
                yield Problem(file, number, error.field, error.reason, error.message)
