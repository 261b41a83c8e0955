"""One file as the difference to another, so that a small edit of a large file is a small upload.

Whoever has the old file tells its chunks by hash (a signature); whoever has the new one answers with what is not among
them (a delta); both together give the new file. Chunks are runs of whole lines, cut where a line's own hash says so: an
insertion moves no cut but those beside it. Bytes that are no lines hold line ends often enough for the same rule.

A delta is MAGIC, then records: "C" offset length (copy from the old file), or "L" length bytes (as they are). Hashes are
short, for a wrong guess harms nobody: the new file is kept only if its sha256 is the announced one.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import BinaryIO

from services.finetune.errors import InvalidArgument

MAGIC = b"QDELTA1\n"
LEAST_CHUNK_BYTES = 512
MOST_CHUNKS = 1 << 17
"""About so many chunks, and never more than twice that, whatever the file's size: a signature fits one message."""
LINE_BYTES = 64 << 10
PIECE_BYTES = 1 << 20

_CHUNK = struct.Struct("<8sI")
_COPY = struct.Struct("<cQQ")
_LITERAL = struct.Struct("<cQ")


@dataclass(frozen=True, slots=True)
class Signature:
    """The chunks of a file: 12 bytes each, a hash of 8 and the length. `chunk_bytes` is their mean length, by which the
    other file must be cut too."""

    chunk_bytes: int
    chunks: bytes


def sign(source: BinaryIO, size: int) -> Signature:
    """The signature of a file of `size` bytes."""
    mean = LEAST_CHUNK_BYTES
    while size > mean * MOST_CHUNKS:
        mean *= 2
    return Signature(mean, b"".join(_CHUNK.pack(_hash(c), len(c)) for c in cut(pieces(source), mean)))


def write_delta(old: Signature, new: BinaryIO, out: BinaryIO) -> int:
    """Write what makes `new` out of the signed file; how many bytes of it are literal."""
    where, starts = _index(old)
    out.write(MAGIC)
    copy, end, literal, total = 0, 0, bytearray(), 0

    def flush_copy() -> None:
        if end > copy:
            out.write(_COPY.pack(b"C", copy, end - copy))

    def flush_literal() -> None:
        if literal:
            out.write(_LITERAL.pack(b"L", len(literal)) + literal)
            literal.clear()

    for chunk in cut(pieces(new), old.chunk_bytes):
        key = _CHUNK.pack(_hash(chunk), len(chunk))
        # Of equal chunks the one that goes on with the present copy makes the shortest delta.
        at = end if starts.get(end) == key and end > copy else where.get(key)
        if at is None:
            flush_copy()
            copy = end = 0
            literal += chunk
            total += len(chunk)
            if len(literal) >= PIECE_BYTES:
                flush_literal()
            continue
        flush_literal()
        if at != end or end == copy:
            flush_copy()
            copy = at
        end = at + len(chunk)
    flush_literal()
    flush_copy()
    return total


def apply(old: BinaryIO, delta: BinaryIO) -> Iterator[bytes]:
    """The new file's bytes, in pieces of at most 1 MiB. InvalidArgument (DELTA_MALFORMED)."""
    if delta.read(len(MAGIC)) != MAGIC:
        raise _malformed("it does not begin as a delta")
    while kind := delta.read(1):
        if kind == b"C":
            offset, length = struct.unpack("<QQ", _exactly(delta, 16))
            if offset >= 1 << 62:
                raise _malformed("a copy begins beyond any file")
            old.seek(offset)
            yield from _some(old, length)
        elif kind == b"L":
            yield from _some(delta, struct.unpack("<Q", _exactly(delta, 8))[0])
        else:
            raise _malformed(f"a record of the kind {kind!r}")


def cut(data: Iterable[bytes], mean: int) -> Iterator[bytes]:
    """Runs of lines, `mean` bytes long on average."""
    held: list[bytes] = []
    size = 0
    for line in _lines(data):
        held.append(line)
        size += len(line)
        asked = size >= mean // 2 and zlib.crc32(line) % (mean // len(line) + 1) == 0
        if asked or size >= 16 * mean:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)


def pieces(source: BinaryIO) -> Iterator[bytes]:
    """A file's bytes from where it stands, in pieces of at most 1 MiB."""
    while piece := source.read(PIECE_BYTES):
        yield piece


def _lines(data: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends, however the data is cut; what is longer than LINE_BYTES comes in several parts."""
    rest = b""
    for piece in data:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield from _parts(line + b"\n")
        while len(rest) > LINE_BYTES:
            yield rest[:LINE_BYTES]
            rest = rest[LINE_BYTES:]
    if rest:
        yield rest


def _parts(line: bytes) -> Iterable[bytes]:
    if len(line) <= LINE_BYTES:
        return (line,)
    return (line[at : at + LINE_BYTES] for at in range(0, len(line), LINE_BYTES))


def _hash(chunk: bytes) -> bytes:
    return blake2b(chunk, digest_size=8).digest()


def _index(old: Signature) -> tuple[dict[bytes, int], dict[int, bytes]]:
    """(where a chunk first stands, which chunk begins at a place)."""
    where: dict[bytes, int] = {}
    starts: dict[int, bytes] = {}
    at = 0
    for n in range(0, len(old.chunks) - _CHUNK.size + 1, _CHUNK.size):
        key = old.chunks[n : n + _CHUNK.size]
        where.setdefault(key, at)
        starts[at] = key
        at += _CHUNK.unpack(key)[1]
    return where, starts


def _exactly(source: BinaryIO, count: int) -> bytes:
    data = source.read(count)
    if len(data) != count:
        raise _malformed("it is cut off")
    return data


def _some(source: BinaryIO, left: int) -> Iterator[bytes]:
    while left > 0:
        piece = source.read(min(PIECE_BYTES, left))
        if not piece:
            raise _malformed("it asks for bytes that are not there")
        left -= len(piece)
        yield piece


def _malformed(why: str) -> InvalidArgument:
    return InvalidArgument(f"the delta cannot be applied: {why}; upload the whole file", reason="DELTA_MALFORMED")
