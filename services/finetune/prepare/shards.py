"""Files to shards that can be read apart: by bytes where a row is a line, else a whole file.

What the shards are depends on the files only, never on how many processes read them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from services.finetune.formats import Problem, Row, read_rows
from services.finetune.formats.text import BOM

SHARD_BYTES = 4 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dataset to prepare."""

    name: str
    """Resource name, for messages."""
    files: tuple[tuple[str, Path], ...]
    """(path in the artifact, path on disk), in order."""
    format: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """The column mapping, if the format needs one."""
    weight: float = 1.0
    """How often each row is taken: 2.0 is twice, 0.5 a seeded half of the rows, 1.5 all rows and half of them again."""
    images: Mapping[str, tuple[str, Path]] | None = None
    """The files that rows may name, by path in the artifact: digest and path on disk. Without it images are counted only."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows that begin at the bytes `start` to `stop` of a file; the whole file if `stop` is 0."""

    number: int
    source: int
    file: str
    path: Path
    format: str
    columns: Mapping[str, str]
    start: int = 0
    stop: int = 0


def cut(sources: Sequence[Source]) -> list[Shard]:
    """All shards, in the order of the rows."""
    found: list[Shard] = []
    for n, source in enumerate(sources):
        for file, path in source.files:
            for start, stop in _spans(file, path):
                found.append(Shard(len(found), n, file, path, source.format, source.columns, start, stop))
    return found


def read(shard: Shard, scratch: Path) -> Iterator[Row | Problem]:
    """The rows of a shard, good or bad; `row` counts lines from the shard's first, see `lines_before`."""
    if not shard.stop:
        yield from read_rows([(shard.file, shard.path)], shard.format, shard.columns)
        return
    part = scratch / f"{shard.number}.jsonl"
    try:
        _copy(shard, part)
        for row in read_rows([(shard.file, part)], shard.format, shard.columns):
            yield replace(row, row=row.row - 1)
    finally:
        part.unlink(missing_ok=True)


def lines_before(shard: Shard) -> int:
    """The lines of the shard's file that stand before it: what to add to its row numbers."""
    with shard.path.open("rb") as source:
        return sum(piece.count(b"\n") for piece in _pieces(source, 0, _next_line(source, shard.start)))


def _spans(file: str, path: Path) -> list[tuple[int, int]]:
    size = path.stat().st_size
    if file.rpartition(".")[2].lower() not in ("jsonl", "ndjson") or size <= SHARD_BYTES:
        return [(0, 0)]
    with path.open("rb") as source:
        if source.read(2) in (b"\xff\xfe", b"\xfe\xff"):  # UTF-16: one Problem, not one a line
            return [(0, 0)]
    return [(start, min(start + SHARD_BYTES, size)) for start in range(0, size, SHARD_BYTES)]


def _copy(shard: Shard, part: Path) -> None:
    """Write the shard's lines as a file of their own, behind an empty line: only a file's first line may begin with a
    byte order mark, and no line of another shard is the file's first."""
    with shard.path.open("rb") as source, part.open("wb") as out:
        begin, end = _bounds(source, shard)
        pieces = _pieces(source, begin, end)
        first = next(pieces, b"")
        out.write(b"\n" + (first if begin else first.removeprefix(BOM)))
        out.writelines(pieces)


def _bounds(source: BinaryIO, shard: Shard) -> tuple[int, int]:
    return _next_line(source, shard.start), _next_line(source, shard.stop)


def _next_line(source: BinaryIO, at: int) -> int:
    """Where the first line begins that does not begin before `at`, or the file ends."""
    if not at:
        return 0
    source.seek(at - 1)
    at -= 1
    while piece := source.read(_PIECE_BYTES):
        if (end := piece.find(b"\n")) >= 0:
            return at + end + 1
        at += len(piece)
    return at


def _pieces(source: BinaryIO, begin: int, end: int) -> Iterator[bytes]:
    source.seek(begin)
    while begin < end and (piece := source.read(min(_PIECE_BYTES, end - begin))):
        begin += len(piece)
        yield piece
