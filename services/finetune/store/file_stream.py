"""A blob of unknown digest streamed into a folder: hashed while it is written, synced while it grows."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from services.finetune.store.checks import check_size, check_upload_id, disk_errors
from services.finetune.store.port import Blob

if TYPE_CHECKING:
    from services.finetune.store.file import FileStore

SYNC_BYTES = 128 << 20
"""So much is written at most before the disk gets it: at the end little is left to wait for."""


def put_stream(store: FileStore, stream_id: str, size: int, pieces: Iterable[bytes | memoryview]) -> Blob:
    """See Store.put_stream."""
    path = _path(store.root, check_upload_id(stream_id))
    try:
        with disk_errors(store.root), path.open("wb", buffering=0) as out:
            digest, found = _write(out.fileno(), pieces)
        check_size(found, size)
        with disk_errors(store.root):
            store.keep_blob(path, digest)
    finally:
        path.unlink(missing_ok=True)
    return Blob(digest, size)


def drop_streams(root: Path, prefix: str) -> None:
    """See Store.drop_streams."""
    with disk_errors(root):
        for path in (root / "tmp").glob(_path(root, check_upload_id(prefix)).name + "*"):
            path.unlink(missing_ok=True)


def _path(root: Path, stream_id: str) -> Path:
    return root / "tmp" / f"stream-{stream_id}"


def _write(fd: int, pieces: Iterable[bytes | memoryview]) -> tuple[str, int]:
    """(digest, bytes). A piece is hashed while it is written."""
    sha, size, synced = hashlib.sha256(), 0, 0
    syncing: Future[None] | None = None
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as syncer:
        for piece in pieces:
            hashed = hasher.submit(sha.update, piece)
            left = memoryview(piece).cast("B")
            size += len(left)
            try:
                while left:
                    left = left[os.write(fd, left) :]
            finally:
                hashed.result()
            if size - synced >= SYNC_BYTES and (syncing is None or syncing.done()):
                if syncing is not None:
                    syncing.result()
                syncing, synced = syncer.submit(os.fdatasync, fd), size
        if syncing is not None:
            with contextlib.suppress(OSError):  # the last sync tells of it too
                syncing.result()
        os.fsync(fd)
    return "sha256:" + sha.hexdigest(), size
