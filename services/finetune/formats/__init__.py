"""Rows of any format become conversations; what cannot be read is blamed by file, row and field.

A format is one row of `FORMATS`: adding one is adding a line to table.py and its `convert` function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from services.finetune.errors import InvalidArgument, nearest

IMAGE = "<image>"
"""In a question: an image stands here."""

Tool = Mapping[str, Any]
"""A tool's definition, as OpenAI writes it: {"type": "function", "function": {name, description, parameters}}."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool; `id`, if there is one, is what its result names."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `role` is system, user, assistant or tool; an assistant's turn is learned if `trained`.

    A message of role text is a run of plain text that no template frames; `ends` says that the tokenizer's EOS follows
    it, and `marks` are texts in it that may be special tokens.
    """

    role: str
    content: str
    trained: bool = True
    calls: tuple[Call, ...] = ()
    """An assistant's calls, after its content."""
    call_id: str = ""
    """Of a tool's result: the call that it answers."""
    name: str = ""
    """Of a tool's result: the tool."""
    ends: bool = False
    marks: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    """Of an assistant's turn in a prompt: the tokens in which a model said it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns: user and assistant in turn, system turns before a user's, results of tools after an assistant's calls.

    Or running text: every message of role text. `images` are relative paths, one for each <image> mark in the users'
    turns, in order. `rejected` is what should not be said in place of the last answer.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    images: tuple[str, ...] = ()
    rejected: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A good row and where it stands: `row` counts from 1, lines in .jsonl and .csv, else rows. `tolerated` names what was
    read though it is spelled otherwise."""

    file: str
    row: int
    conversation: Conversation
    tolerated: str = ""


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
    """How one kind of row is read: `fields` must be there, `optional` are read too. A row is taken for this format when
    it `fits`; without it the format is used by its name only."""

    name: str
    description: str
    fields: tuple[str, ...]
    convert: Callable[[Mapping[str, Any]], Conversation]
    optional: tuple[str, ...] = ()
    fits: Callable[[Mapping[str, Any]], bool] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How a data set's rows are read: their format ("" to detect it), the columns of the files that stand for the
    format's fields, and whether bad rows may be left out."""

    format: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    skip_bad_rows: bool = False


DETECTED = Reading()


def _table() -> dict[str, Format]:
    from services.finetune.formats.table import ALL

    return {f.name: f for f in ALL}


# The table's modules import the classes above, so the table comes after them.
FORMATS: Mapping[str, Format] = _table()

ALIASES: Mapping[str, str] = {"crime_kg_assitan": "crime_kg_assitant"}
"""Names that XTuner uses beside those of FORMATS."""

SNIFFED_ROWS = 100
CONVERSATION = "`conversation` is read as `conversations`"


def format_named(name: str) -> Format:
    """A format by name. InvalidArgument (FORMAT_UNKNOWN) naming the nearest."""
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        raise InvalidArgument(f"unknown format {name!r}{nearest(name, list(FORMATS))}", reason="FORMAT_UNKNOWN")
    return FORMATS[name]


def detect(rows: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(format, reason): what most of `rows` fit, the table's first of equals. InvalidArgument (FORMAT_UNDETECTED)."""
    several = [rows] if isinstance(rows, Mapping) else rows
    fitting = {f.name: sum(f.fits(row) for row in several) for f in FORMATS.values() if f.fits is not None}
    name = max(fitting, key=fitting.__getitem__)
    if fitting[name]:
        count, form = fitting[name], FORMATS[name]
        first = next(row for row in several if form.fits is not None and form.fits(row))
        fields = " and ".join(f for f in (*form.fields, *form.optional) if first.get(f) is not None)
        others = [n for n, c in fitting.items() if c == count and n != name]
        who = "the first row has" if len(several) == 1 else f"{count} of the first {len(several)} rows have"
        also = f"; they fit {' and '.join(others)} too: name the format if that is meant" if others else ""
        return name, f"{who} {fields}{also}"
    known = "; ".join(f"{f.name}: {f.description}" for f in FORMATS.values())
    found = ", ".join(repr(str(name)[:40]) for name in list(several[0])[:20])
    raise InvalidArgument(
        f"no format fits a row with the fields {found}; map its columns to a format's fields, or use one of {known}",
        reason="FORMAT_UNDETECTED",
    )


def sniff(files: Iterable[tuple[str, Path]], columns: Mapping[str, str] = MappingProxyType({})) -> tuple[str, str]:
    """(format, reason) from the first readable row, or if that fits none or several from SNIFFED_ROWS rows.

    Raises InvalidArgument (FORMAT_UNDETECTED, DATASET_EMPTY, COLUMN_MISSING).
    """
    problem: Problem | None = None
    rows: list[Mapping[str, Any]] = []
    for raw in _mapped(files, columns):
        if isinstance(raw, Problem):
            problem = problem or raw
            continue
        rows.append(raw[2])
        clear = len(rows) == 1 and sum(f.fits is not None and f.fits(raw[2]) for f in FORMATS.values()) == 1
        if clear or len(rows) == SNIFFED_ROWS:
            break
    if rows:
        return detect(rows)
    if problem is not None:
        raise InvalidArgument(
            f"no row can be read; the first fails at files[{problem.file}].rows[{problem.row}]: {problem.message}",
            reason="COLUMN_MISSING" if problem.reason == "COLUMN_MISSING" else "FORMAT_UNDETECTED",
        )
    raise InvalidArgument("the files hold no row", reason="DATASET_EMPTY")


def read_rows(
    files: Iterable[tuple[str, Path]],
    format: str,
    columns: Mapping[str, str] = MappingProxyType({}),
    carried: Collection[str] | None = None,
) -> Iterator[Row | Problem]:
    """Every row of the files (path in the artifact, path on disk), good or bad, in order; what holds no rows is passed over.

    `columns` maps a format's fields to the columns of the files that stand for them. With `carried`, all paths of the
    artifact, an image that a row names must be one of them. InvalidArgument (FORMAT_UNKNOWN, COLUMN_UNKNOWN).
    """
    from services.finetune.formats.carried import lost_image

    chosen = format_named(format)
    _check_columns(chosen, columns)
    for raw in _mapped(files, columns):
        if isinstance(raw, Problem):
            yield raw
            continue
        file, number, fields = raw
        try:
            conversation = chosen.convert(fields)
            if carried is not None and (lost := lost_image(file, fields, carried)) is not None:
                raise lost
            yield Row(file, number, conversation, CONVERSATION if _misspelled(chosen, fields) else "")
        except RowError as error:
            yield _blamed(file, number, error, columns)
        except RecursionError:
            yield Problem(file, number, "", "JSON_TOO_DEEP", "the row is nested too deep; flatten it")


def _misspelled(format: Format, fields: Mapping[str, Any]) -> bool:
    """The tutorial's schema of LLaVA's rows says conversation, and its rows say conversations."""
    turns = "conversations" in format.fields and fields.get("conversations") is None
    return turns and fields.get("conversation") is not None


def _check_columns(format: Format, columns: Mapping[str, str]) -> None:
    known = [*format.fields, *format.optional]
    for name in columns:
        if name not in known:
            raise InvalidArgument(
                f"columns: the format {format.name} has no field {name[:40]!r}{nearest(name, known)}; it has "
                + ", ".join(known),
                reason="COLUMN_UNKNOWN",
            )


def _mapped(
    files: Iterable[tuple[str, Path]], columns: Mapping[str, str]
) -> Iterator[tuple[str, int, Mapping[str, Any]] | Problem]:
    """Raw rows with their columns under the names of fields: (file, row number, fields)."""
    from services.finetune.formats.containers import is_row_file, raw_rows

    taken = set(columns.values()) - set(columns)
    for file, path in files:
        for raw in raw_rows(file, path) if is_row_file(file) else ():
            if isinstance(raw, Problem):
                yield raw
            elif absent := [c for c in columns.values() if c not in raw[1]]:
                near = nearest(absent[0], [str(name)[:40] for name in raw[1]])
                message = f"there is no column {absent[0][:40]!r}{near}; mend the mapping of columns"
                yield Problem(file, raw[0], absent[0][:40], "COLUMN_MISSING", message)
            else:
                named = {field: raw[1][column] for field, column in columns.items()}
                yield file, raw[0], {**{k: v for k, v in raw[1].items() if k not in taken}, **named}


def _blamed(file: str, number: int, error: RowError, columns: Mapping[str, str]) -> Problem:
    """A row's problem under the name that the field has in the file."""
    head = re.split(r"[.\[]", error.field, maxsplit=1)[0]
    column = columns.get(head, head)
    if column == head:
        return Problem(file, number, error.field, error.reason, error.message)
    message = f"{error.message} (the column {column[:40]} stands for {head})"
    return Problem(file, number, column[:40] + error.field[len(head) :], error.reason, message)
