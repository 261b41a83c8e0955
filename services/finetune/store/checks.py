"""What both stores refuse, in the same words: malformed digests, keys and ids, wrong offsets, sizes and sums."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from services.finetune.errors import (
    Aborted,
    DataLoss,
    InvalidArgument,
    NotFound,
    OutOfRange,
    QuartetError,
    ResourceExhausted,
    Unavailable,
)

HEX = frozenset("0123456789abcdef")
PIECE_BYTES = 1 << 20
TOUCH_AFTER_S = 600.0
"""A blob stored or touched within so many seconds is not touched again: garbage is older than that by far."""


def blob_name(digest: str) -> str:
    """``sha256/ab/<hex>`` of a digest. InvalidArgument (DIGEST_MALFORMED)."""
    kind, _, text = digest.partition(":")
    if kind != "sha256" or len(text) != 64 or not set(text) <= HEX:
        raise InvalidArgument(
            f"malformed digest {digest[:100]!r}: write sha256:<64 lower-case hex digits>", reason="DIGEST_MALFORMED"
        )
    return f"sha256/{text[:2]}/{text}"


def check_key(key: str) -> str:
    """`key` if it is relative, plain and fits a file name. InvalidArgument (KEY_MALFORMED)."""
    _check_parts(key, key.split("/"))
    return key


def check_prefix(prefix: str) -> str:
    """`prefix` if keys can begin so; its last part may be empty or a part of a name. InvalidArgument (KEY_MALFORMED)."""
    _check_parts(prefix, prefix.split("/")[:-1])
    return prefix


def _check_parts(key: str, parts: list[str]) -> None:
    odd = any(p in ("", ".", "..") or len(p.encode()) > 200 for p in parts) or any(ord(c) < 32 for c in key)
    if odd or len(key.encode()) > 900:
        raise InvalidArgument(
            f"malformed object key {key[:200]!r}: write plain parts of 1 to 200 bytes with / between them",
            reason="KEY_MALFORMED",
        )


def check_upload_id(text: str) -> str:
    """`text` if it is one plain word. InvalidArgument (NAME_MALFORMED)."""
    if not text or len(text) > 200 or not all(c.isascii() and (c.isalnum() or c in "-_") for c in text):
        raise InvalidArgument(
            f"malformed upload id {text[:100]!r}: write 1 to 200 letters, digits, - and _", reason="NAME_MALFORMED"
        )
    return text


def check_offset(offset: int, end: int) -> None:
    """OutOfRange (OFFSET_WRONG) unless a chunk at `offset` goes on where the upload ends."""
    if offset != end:
        raise OutOfRange(
            f"the upload has {end} bytes, so the next chunk must begin there, not at {offset}",
            reason="OFFSET_WRONG",
            metadata={"offset_bytes": str(end)},
        )


def check_size(found: int, announced: int) -> None:
    """InvalidArgument (SIZE_MISMATCH) unless all bytes arrived."""
    if found != announced:
        raise InvalidArgument(
            f"{found} bytes arrived, {announced} were announced; begin the upload again",
            reason="SIZE_MISMATCH",
            metadata={"size_bytes": str(found), "announced_bytes": str(announced)},
        )


def check_digest(found: str, announced: str) -> None:
    """InvalidArgument (DIGEST_MISMATCH) unless what arrived is what was announced."""
    if found != announced:
        raise InvalidArgument(
            f"the bytes hash to {found}, announced was {announced}; begin the upload again",
            reason="DIGEST_MISMATCH",
            metadata={"digest": found, "announced": announced},
        )


def check_same(known: tuple[str, int], asked: tuple[str, int]) -> None:
    """An upload id that is in use goes on only with what it was begun for. InvalidArgument as the two above."""
    check_digest(asked[0], known[0])
    check_size(asked[1], known[1])


def no_blob(digest: str) -> NotFound:
    return NotFound(f"blob {digest} is not in the store", reason="BLOB_NOT_FOUND", metadata={"digest": digest})


def corrupt(digest: str, found: str) -> DataLoss:
    return DataLoss(
        f"blob {digest} is damaged: its bytes hash to {found}; store it again from its source",
        reason="BLOB_CORRUPT",
        metadata={"digest": digest},
    )


def cut_short(digest: str) -> DataLoss:
    return DataLoss(
        f"blob {digest} ends before its time; store it again from its source",
        reason="BLOB_CORRUPT",
        metadata={"digest": digest},
    )


def lost_race(key: str) -> Aborted:
    return Aborted(f"{key} changed meanwhile; read it again", reason="PRECONDITION_FAILED", metadata={"key": key})


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn what the operating system says about `root` into our words."""
    try:
        yield
    except QuartetError:  # some of ours are an OSError too
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ResourceExhausted(
                f"the disk of {root} is full; free some space and try again", reason="DISK_FULL"
            ) from error
        raise Unavailable(
            f"{root} cannot be used: {error.strerror or error}; check that it is there and may be written to",
            reason="STORE_UNREACHABLE",
        ) from error
