"""Rows of JSON: a line each, or the elements of an array, of which no more is held than one needs."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from services.finetune.formats import Problem
from services.finetune.formats.text import (
    BOM,
    HAS_NUL,
    IS_UTF16,
    MAX_LINE_BYTES,
    UTF16,
    Raw,
    Spoiled,
    lines_of,
    not_utf8,
)

CHUNK_BYTES = 4 << 20


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
_SPACE = re.compile(r"[ \t\n\r]*")


def _value(file: str, number: int, text: str, at: int = 0, before: tuple[int, int] = (0, 0)) -> tuple[Any, int]:
    """The value that begins at `at`, or a Problem, and where it ends (-1 if that cannot be told). `before` are the lines
    that ended before `text`, and the columns of its first that did."""
    try:
        return _STRICT.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line, column = before[0] + error.lineno, error.colno + (before[1] if error.lineno == 1 else 0)
        where = f"line {line}, column {column}" if line > 1 else f"column {column}"
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
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too


def whole(file: str, number: int, text: str) -> Any:
    """The one value that `text` is, or a Problem."""
    value, end = _value(file, number, text, _space(text, 0))
    if end < 0 or isinstance(value, Problem) or _space(text, end) == len(text):
        return value
    message = f"more text after the JSON at column {_space(text, end) + 1}; put one row on a line"
    return Problem(file, number, "", "JSON_INVALID", message)


def jsonl_rows(file: str, source: BinaryIO) -> Iterator[Raw]:
    for number, text in lines_of(file, source):
        if isinstance(text, Problem):
            yield text
        elif text.strip():
            yield _row(file, number, whole(file, number, text))


def json_rows(file: str, source: BinaryIO) -> Iterator[Raw]:
    """Rows of an array, or one that stands alone; memory is that of the longest row."""
    window = _Window(file, source)
    try:
        if window.next() == "[":
            window.at += 1
            yield from _array(window)
        elif window.next():
            value, known = window.value()
            if known and window.next():
                # A file of JSON lines with the wrong ending is common and unambiguous.
                source.seek(0)
                yield from jsonl_rows(file, source)
                return
            yield _row(file, 1, value)
    except Spoiled as spoiled:
        yield spoiled.problem


def _array(window: _Window) -> Iterator[Raw]:
    """The elements behind the opening bracket, to the closing one."""
    file, closed = window.file, window.next() == "]"
    window.number -= 1
    while not closed:
        window.number += 1
        value, known = window.value()
        yield _row(file, window.number, value)
        if not known:
            return
        closed = window.next() == "]"
        if not closed and window.next() != ",":
            message = f"no comma or closing bracket after row {window.number}; is the file cut off?"
            yield Problem(file, window.number + 1, "", "JSON_INVALID", message)
            return
        window.at += 0 if closed else 1
    window.at += 1
    if window.next():
        yield Problem(file, window.number + 1, "", "JSON_INVALID", "more text after the array; remove it")


class _Window:
    """As much of a file's text as its next value needs."""

    def __init__(self, file: str, source: BinaryIO) -> None:
        self.file = file
        self.number = 1
        """Of the row that is read."""
        self.at = 0
        self._source = source
        self._text = ""
        self._rest = b""
        """The beginning of a character whose other bytes are still to be read."""
        self._read = 0
        self._ended = False
        self._spoiled: tuple[str, str] | None = None
        """(reason, message) of what stands behind the window and is no text."""
        self._before = (0, 0)
        """Lines that ended before the window, and columns of its first that did."""

    def next(self) -> str:
        """The next character that is no white space, "" at the end; `at` is its place."""
        self.at = _space(self._text, self.at)
        while self.at == len(self._text) and not self._ended:
            self._more()
            self.at = _space(self._text, self.at)
        return self._text[self.at : self.at + 1]

    def value(self) -> tuple[Any, bool]:
        """The value that begins here, or a Problem; whether it is known where it ends, which is where `at` is then."""
        self.next()
        while True:
            value, end = _value(self.file, self.number, self._text, self.at, self._before)
            # What ends with the window may go on behind it, and what is broken may be cut there.
            if self._ended or 0 <= end < len(self._text):
                break
            if len(self._text) - self.at > MAX_LINE_BYTES:
                told = f": {value.message}" if isinstance(value, Problem) else "; split it"
                value, end = self._problem("LINE_TOO_LONG", f"the row does not end within 64 MiB{told}"), -1
                break
            self._more()
        self.at = max(self.at, end)
        return value, end >= 0

    def _more(self) -> None:
        if self._spoiled:
            raise Spoiled(self._problem(*self._spoiled))
        gone = self._text[: self.at]
        lines, column = gone.count("\n"), len(gone) - gone.rfind("\n") - 1
        self._before = (self._before[0] + lines, column + (0 if lines else self._before[1]))
        # At least as much again: a long row is not tried over and over.
        data = self._source.read(max(CHUNK_BYTES, len(self._text) - self.at))
        self._ended = not data
        self._text, self.at = self._text[self.at :] + self._decode(self._rest + data), 0

    def _decode(self, data: bytes) -> str:
        """Text, up to what is none: that is told when it is reached."""
        if not self._read:
            if data[:2] in UTF16:
                raise Spoiled(self._problem("ENCODING_UTF16", IS_UTF16))
            data, self._read = data.removeprefix(BOM), len(BOM) if data.startswith(BOM) else 0
        try:
            text, used = codecs.utf_8_decode(data, "strict", self._ended)
        except UnicodeDecodeError as error:
            text, used = data[: error.start].decode(), error.start
            lines = self._before[0] + self._text.count("\n", self.at) + text.count("\n")
            self._spoiled = ("ENCODING_INVALID", not_utf8(self._read + used, lines))
        self._rest, self._read = data[used:], self._read + used
        clean, nul, _ = text.partition("\0")
        if nul:
            self._spoiled = ("NUL_BYTE", HAS_NUL)
        return clean

    def _problem(self, reason: str, message: str) -> Problem:
        return Problem(self.file, self.number, "", reason, message)
