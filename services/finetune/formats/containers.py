"""Files to raw rows: JSON Lines, a JSON array, CSV, Parquet. Rows stream, apart from a JSON array, whose text is held.

What is wrong with one row never hides the next, as long as it can be told where the next one begins.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

from services.finetune.errors import InvalidArgument
from services.finetune.formats import Problem

MAX_LINE_BYTES = 64 << 20
MAX_JSON_BYTES = 2 << 30
MAX_COLUMNS = 10_000
BOM = b"\xef\xbb\xbf"

Raw = tuple[int, Mapping[str, Any]] | Problem


def raw_rows(file: str, path: Path) -> Iterator[Raw]:
    """(row number, fields) of each row, or a Problem. The ending of `file` tells the container.

    Raises InvalidArgument (FORMAT_UNDETECTED) for another ending.
    """
    ending = file.rpartition(".")[2].lower()
    readers = {"jsonl": _jsonl, "ndjson": _jsonl, "json": _json, "csv": _csv, "parquet": _parquet}
    if ending not in readers:
        raise InvalidArgument(
            f"{file}: cannot read .{ending} files; use .jsonl, .json, .csv or .parquet", reason="FORMAT_UNDETECTED"
        )
    return readers[ending](file, path)


# ---- text ----


def _lines(file: str, source: BinaryIO) -> Iterator[tuple[int, str | Problem]]:
    """Numbered lines with their endings. A file in UTF-16 is one Problem, not one a line."""
    number = 0
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = source.readline(MAX_LINE_BYTES)
            yield number, Problem(file, number, "", "LINE_TOO_LONG", "the line is longer than 64 MiB; split the row")
            continue
        text = _decode(file, number, line.removeprefix(BOM) if number == 1 else line)
        yield number, text
        if isinstance(text, Problem) and text.reason == "ENCODING_UTF16":
            return


def _decode(file: str, number: int, data: bytes) -> str | Problem:
    if number == 1 and data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return Problem(file, number, "", "ENCODING_UTF16", "the file is UTF-16; save it as UTF-8")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        where = f"byte {error.start + 1}" + (f" (line {line + 1})" if line else "")
        message = f"{where} is not UTF-8, as in a Latin-1 file; save the file as UTF-8"
        return Problem(file, number, "", "ENCODING_INVALID", message)
    if "\0" in text:
        return Problem(file, number, "", "NUL_BYTE", "a NUL byte: the file is damaged or UTF-16; save it as UTF-8")
    return text


# ---- JSON ----


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(k for k, count in Counter(k for k, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object; remove one")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; use a number or null")


_STRICT = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)
_LENIENT = json.JSONDecoder()


def _value(file: str, number: int, text: str, at: int = 0) -> tuple[Any, int]:
    """The value that begins at `at`, or a Problem, and where it ends (-1 if that cannot be told)."""
    try:
        return _STRICT.raw_decode(text, at)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        return Problem(file, number, "", "JSON_INVALID", f"broken JSON at {where}: {error.msg}; mend the row"), -1
    except RecursionError:
        return Problem(file, number, "", "JSON_TOO_DEEP", "the JSON is nested too deep; flatten it"), -1
    except ValueError as error:
        problem = Problem(file, number, "", "JSON_INVALID", str(error))
    try:
        return problem, _LENIENT.raw_decode(text, at)[1]
    except (ValueError, RecursionError):
        return problem, -1


def _row(file: str, number: int, value: Any) -> Raw:
    if isinstance(value, Problem):
        return value
    if not isinstance(value, Mapping):
        message = f"a row must be an object, as {{...}}, not {type(value).__name__}"
        return Problem(file, number, "", "ROW_NOT_OBJECT", message)
    return number, value


def _space(text: str, at: int) -> int:
    """The next place at or after `at` that is no JSON white space."""
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _whole(file: str, number: int, text: str) -> Any:
    """The one value that `text` is, or a Problem."""
    value, end = _value(file, number, text, _space(text, 0))
    if end < 0 or isinstance(value, Problem) or _space(text, end) == len(text):
        return value
    message = f"more text after the JSON at column {_space(text, end) + 1}; put one row on a line"
    return Problem(file, number, "", "JSON_INVALID", message)


def _jsonl(file: str, path: Path) -> Iterator[Raw]:
    with path.open("rb") as source:
        for number, text in _lines(file, source):
            if isinstance(text, Problem):
                yield text
            elif text.strip():
                yield _row(file, number, _whole(file, number, text))


def _json(file: str, path: Path) -> Iterator[Raw]:
    if path.stat().st_size > MAX_JSON_BYTES:
        yield Problem(file, 1, "", "FILE_TOO_LARGE", "a .json array is read whole; use .jsonl above 2 GiB")
        return
    text = _decode(file, 1, path.read_bytes().removeprefix(BOM))
    if isinstance(text, Problem):
        yield text
        return
    at = _space(text, 0)
    if text[at : at + 1] == "[":
        yield from _array(file, text, _space(text, at + 1))
        return
    if at == len(text):
        return
    value, end = _value(file, 1, text, at)
    if end >= 0 and _space(text, end) < len(text):
        # A file of JSON lines with the wrong ending is common and unambiguous.
        yield from _jsonl(file, path)
        return
    yield _row(file, 1, value)


def _array(file: str, text: str, at: int) -> Iterator[Raw]:
    """The elements from `at`, just behind the opening bracket, to the closing one."""
    number, closed = 0, text[at : at + 1] == "]"
    while not closed:
        number += 1
        value, end = _value(file, number, text, at)
        yield _row(file, number, value)
        if end < 0:
            return
        at = _space(text, end)
        closed = text[at : at + 1] == "]"
        if not closed and text[at : at + 1] != ",":
            message = f"no comma or closing bracket after row {number}; is the file cut off?"
            yield Problem(file, number + 1, "", "JSON_INVALID", message)
            return
        at = _space(text, at + 1) if not closed else at
    if _space(text, at + 1) < len(text):
        yield Problem(file, number + 1, "", "JSON_INVALID", "more text after the array; remove it")


# ---- CSV ----


_JSON_COLUMNS = ("messages", "conversations", "conversation", "tools", "history", "images")


class _BadLine(ValueError):
    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class _CsvLines:
    """Lines for csv.reader. A generator would end at its first error; this goes on with the next line."""

    def __init__(self, file: str, source: BinaryIO) -> None:
        self.number = 0
        self._lines = _lines(file, source)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        self.number, text = next(self._lines)
        if isinstance(text, Problem):
            raise _BadLine(text)
        return text


def _csv(file: str, path: Path) -> Iterator[Raw]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the default, 128 KiB, is less than a long text
    header: list[str] = []
    with path.open("rb") as source:
        lines = _CsvLines(file, source)
        reader = csv.reader(lines, strict=True)
        while True:
            start = lines.number + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except _BadLine as error:
                yield error.problem
                continue
            except csv.Error as error:
                yield Problem(file, start, "", "CSV_INVALID", f"broken CSV: {error}; mend the quotes of this row")
                continue
            if cells and header:
                yield _csv_row(file, start, header, cells)
            elif cells:
                header = cells
                if wrong := _header_problem(file, start, header):
                    yield wrong
                    return


def _header_problem(file: str, row: int, header: list[str]) -> Problem | None:
    if len(header) > MAX_COLUMNS:
        message = f"the header names {len(header)} columns; {MAX_COLUMNS} are read at most: is the line break missing?"
        return Problem(file, row, "", "CSV_HEADER", message)
    twice = min((name for name, count in Counter(header).items() if count > 1), default=None)
    if twice is None:
        return None
    return Problem(file, row, twice[:40], "CSV_HEADER", f"the header names {twice[:40]!r} twice; rename one")


def _csv_row(file: str, number: int, header: list[str], cells: list[str]) -> Raw:
    if len(cells) != len(header):
        message = f"{len(cells)} cells, but the header names {len(header)}; quote cells that hold commas"
        return Problem(file, number, "", "CSV_COLUMNS", message)
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        row[name] = cell
        # XTuner's msagent_react has lists as Python writes them; its format reads them itself.
        if cell[:1] == "[" and cell[:3] != "[{'" and name in _JSON_COLUMNS:
            row[name] = _whole(file, number, cell)
            if isinstance(row[name], Problem):
                found: Problem = row[name]
                return Problem(file, number, name, found.reason, f"in the cell {name}: {found.message}")
    return number, row


# ---- Parquet ----


def _parquet(file: str, path: Path) -> Iterator[Raw]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        message = f"the Parquet file cannot be read from here: {text}; write it again"
        yield Problem(file, number + 1, "", "PARQUET_INVALID", message)
