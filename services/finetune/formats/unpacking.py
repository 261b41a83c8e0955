"""What is packed, as plain bytes: gzip and zstd streams, read forward within bounds."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO

PACKED = ("gz", "zst")

FREE_BYTES = 64 << 20
"""So much may come out of anything, however small it is."""
MAX_RATIO = 100
"""Above that, so many bytes out for each byte in. Text of real rows packs 3 to 20 times."""
PIECE_BYTES = 1 << 16


class PackedError(Exception):
    """A stream that is damaged, cut off, or a bomb: an UPPER_SNAKE reason and what would mend it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


def most_bytes(packed: int) -> int:
    """How many bytes may come out of so many packed ones."""
    return max(FREE_BYTES, MAX_RATIO * packed)


def open_packed(path: Path, packed: str) -> io.BufferedReader:
    """The plain bytes of a file, to be read forward, or from the start again by seek(0); `packed` is one of PACKED, or ""
    for a plain file. Reading raises PackedError."""
    return io.BufferedReader(_Unpacking(path, packed), PIECE_BYTES) if packed else path.open("rb")


class _Unpacking(io.RawIOBase):
    """The library's decompressor, counted."""

    def __init__(self, path: Path, packed: str) -> None:
        self._path, self._packed = path, packed
        self._most = most_bytes(path.stat().st_size)
        self._out = 0
        self._source = self._open()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        if (offset, whence) != (0, 0):
            raise io.UnsupportedOperation("packed bytes are read forward")
        self._source.close()
        self._source, self._out = self._open(), 0
        return 0

    def tell(self) -> int:
        return self._out

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._source.read(len(buffer))
        except (OSError, EOFError, zlib.error, ValueError) as error:
            text = (str(error).splitlines() or ["it ends too soon"])[0][:200]
            name = {"gz": "gzip", "zst": "zstd"}[self._packed]
            raise PackedError(
                f"{name.upper()}_INVALID", f"the {name} file is damaged or cut off ({text}); pack and upload it again"
            ) from error
        self._out += len(data)
        if self._out > self._most:
            raise PackedError(
                "FILE_TOO_LARGE",
                f"it unpacks to more than {self._most >> 20} MiB, over {MAX_RATIO} times its size; upload it unpacked",
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._source.close()
        super().close()

    def _open(self) -> BinaryIO:
        if self._packed == "gz":
            import gzip

            return gzip.open(self._path, "rb")  # type: ignore[return-value]
        import pyarrow

        # The standard library has zstd from 3.14 on.
        stream: BinaryIO = pyarrow.CompressedInputStream(pyarrow.OSFile(str(self._path)), "zstd")
        return stream
