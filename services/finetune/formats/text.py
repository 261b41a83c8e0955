"""The lines of a file in UTF-8, and what is wrong with those that are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from services.finetune.formats import Problem

MAX_LINE_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
IS_UTF16 = "the file is UTF-16; save it as UTF-8"
HAS_NUL = "a NUL byte: the file is damaged or UTF-16; save it as UTF-8"

Raw = tuple[int, Mapping[str, Any]] | Problem


class Spoiled(Exception):
    """What comes next in a file is no text."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def lines_of(file: str, source: BinaryIO) -> Iterator[tuple[int, str | Problem]]:
    """Numbered lines with their endings. A file in UTF-16 is one Problem, not one a line."""
    number = 0
    while line := source.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = source.readline(MAX_LINE_BYTES)
            yield number, Problem(file, number, "", "LINE_TOO_LONG", "the line is longer than 64 MiB; split the row")
            continue
        text = decode(file, number, line.removeprefix(BOM) if number == 1 else line)
        yield number, text
        if isinstance(text, Problem) and text.reason == "ENCODING_UTF16":
            return


def decode(file: str, number: int, data: bytes) -> str | Problem:
    if number == 1 and data[:2] in UTF16:
        return Problem(file, number, "", "ENCODING_UTF16", IS_UTF16)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Problem(file, number, "", "ENCODING_INVALID", not_utf8(error.start))
    return Problem(file, number, "", "NUL_BYTE", HAS_NUL) if "\0" in text else text


def not_utf8(byte: int, lines: int = 0) -> str:
    """What is said of a byte that has so many bytes and lines before it."""
    where = f"byte {byte + 1}" + (f" (line {lines + 1})" if lines else "")
    return f"{where} is not UTF-8, as in a Latin-1 file; save the file as UTF-8"
