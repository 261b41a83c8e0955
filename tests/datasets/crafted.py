"""Archives as an attacker would make them, byte by byte where the libraries refuse to."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence

from tests.datasets.wire import row

ROWS = row() * 3


def zipped(*entries: tuple[str, bytes], mode: int = 0o100644, system: int = 3) -> bytes:
    """A zip of (name, data); `mode` is the Unix kind and rights of each."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr, info.compress_type = system, mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    return out.getvalue()


def named(name: bytes) -> bytes:
    """A zip with one file of rows under a name that libraries would not write: same length as its placeholder."""
    return zipped(("x" * len(name), ROWS)).replace(b"x" * len(name), name)


def encrypted() -> bytes:
    data = bytearray(zipped(("a.jsonl", ROWS)))
    at = data.rfind(b"PK\1\2")
    data[at + 8] |= 1
    return bytes(data)


def overlapping() -> bytes:
    """Two members that are the same bytes of the archive, as in a bomb without nesting."""
    one = zipped(("a.jsonl", ROWS), ("b.jsonl", ROWS))
    first, second = one.find(b"PK\1\2"), one.rfind(b"PK\1\2")
    data = bytearray(one)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return bytes(data)


def lying(size: int) -> bytes:
    """A zip whose directory tells less than its member holds."""
    data = bytearray(zipped(("a.jsonl", ROWS)))
    at = data.rfind(b"PK\1\2")
    struct.pack_into("<I", data, at + 24, size)
    return bytes(data)


def long_directory(entries: int) -> bytes:
    """A zip of so many entries in its directory."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 0, 0, 33, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entry) * entries, 0, 0)
    return entry * entries + end


def tarred(*entries: tuple[str, bytes], change: Callable[[tarfile.TarInfo], object] = lambda info: None) -> bytes:
    """A tar of (name, data); `change` spoils the header of the last."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for n, (name, data) in enumerate(entries):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if n == len(entries) - 1:
                change(info)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def linked(kind: bytes, target: str) -> bytes:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname, info.size = kind, target, 0

    return tarred(("a.jsonl", ROWS), ("evil", b""), change=change)


def long_header(size: int) -> bytes:
    """A gzipped tar whose extended header alone is so long."""
    info = tarfile.TarInfo("header")
    info.type, info.size = tarfile.XHDTYPE, size
    return gzip.compress(info.tobuf() + bytes(size) + tarred(("a.jsonl", ROWS)), 1)


def inflated(size: int) -> bytes:
    """A member that deflates a thousandfold."""
    return zipped(("a.jsonl", bytes(size)))


def bomb(size: int) -> bytes:
    """A gzipped tar of so many zeros."""
    return gzip.compress(tarred(("a.jsonl", bytes(size))), 1)


def many(names: Sequence[str]) -> bytes:
    return zipped(*((name, b"") for name in names))


def damaged(data: bytes) -> bytes:
    """The same archive with a bit of its content turned."""
    at = data.find(zlib.compress(b"")[:1], 60) if b"PK\3\4" in data[:4] else len(data) // 2
    at = max(at, 45)
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
