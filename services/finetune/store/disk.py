"""Files and folders, each written durably, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from services.finetune.store.checks import corrupt


def etag_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_file(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as source:
        return "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def link_or_copy(blob: Path, new: Path, digest: str) -> None:
    """Make `new` the blob's file, or on another disk a verified copy. DataLoss (BLOB_CORRUPT)."""
    try:
        os.link(blob, new)
        return
    except OSError:
        shutil.copyfile(blob, new)
    if (found := hash_file(new)) != digest:
        raise corrupt(digest, found)
    new.chmod(0o444)


def write_verified(pieces: Iterable[bytes], path: Path, digest: str) -> None:
    """Make `path` a blob's read-only file, whole or not at all. DataLoss (BLOB_CORRUPT)."""
    new, sha = path.parent / f".{uuid.uuid4().hex}", hashlib.sha256()
    try:
        with new.open("wb") as out:
            for piece in pieces:
                sha.update(piece)
                out.write(piece)
        if (found := "sha256:" + sha.hexdigest()) != digest:
            raise corrupt(digest, found)
        new.chmod(0o444)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename or link in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
