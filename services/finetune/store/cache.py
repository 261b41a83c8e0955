"""Blobs that this machine has at hand: what one worker fetched, the next one here need not fetch again.

    <folder>/sha256/ab/<hex>         a blob; when it was last used is its mtime
    <folder>/sha256/ab/<hex>.part    one on its way; who fetches it holds its lock (flock)

Many processes share a folder, on a disk of the machine's or a file system of several. What is wrong with it costs time
only: the store is then asked as if there were none. QUARTET_CACHE_DIR names it, QUARTET_CACHE_GIB (64 if unset) bounds it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Self

from services.finetune.errors import InvalidArgument, QuartetError
from services.finetune.store.checks import blob_name, corrupt
from services.finetune.store.disk import hash_file

log = logging.getLogger("quartet.cache")

DIR_VARIABLE, SIZE_VARIABLE = "QUARTET_CACHE_DIR", "QUARTET_CACHE_GIB"
STALLED_S = 60.0
"""A blob whose file has not been written to for so long is not waited for."""
LOOK_S = 0.1

Source = Callable[[], tuple[int, Iterator[bytes]]]
"""Asks the store for a blob: its size in bytes, and its pieces."""


class Cache:
    """At most about `limit_bytes` of blobs; the least lately used go first."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._room = 0  # bytes that may be added before all is counted again

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self | None:
        """None where no folder is named. InvalidArgument (SETTING_INVALID)."""
        if not (folder := environment.get(DIR_VARIABLE)):
            return None
        text = environment.get(SIZE_VARIABLE, "64")
        try:
            limit = int(float(text) * (1 << 30))
        except (ValueError, OverflowError):
            limit = 0
        if limit <= 0:
            raise InvalidArgument(
                f"{SIZE_VARIABLE} is {text!r}; write how many GiB {DIR_VARIABLE} may take, as 200",
                reason="SETTING_INVALID",
            )
        return cls(Path(folder), limit)

    def fetch(self, digest: str, path: Path, source: Source) -> bool:
        """Make `path` a verified copy of the blob (a hard link where the folder is on the same disk) that must never be
        written to. False if the folder cannot serve. DataLoss (BLOB_CORRUPT) of the store's bytes, and what `source` raises.
        """
        kept = self._folder / blob_name(digest)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            return self._take(kept, path, digest) or (
                self._add(kept, digest, source) and self._take(kept, path, digest)
            )
        except QuartetError:  # some of ours are an OSError too
            raise
        except OSError as error:
            log.warning("the cache %s does not serve: %s", self._folder, error)
            return False

    def _take(self, kept: Path, path: Path, digest: str) -> bool:
        """False if it is not there, or damaged: others write here too, and disks forget."""
        new = path.parent / f".{uuid.uuid4().hex}"
        try:
            _link_or_copy(kept, new)
            if hash_file(new) != digest:
                log.warning("%s was damaged, and is fetched again", kept)
                kept.unlink(missing_ok=True)
                return False
            os.utime(kept)
            new.chmod(0o444)
            new.replace(path)
            return True
        except FileNotFoundError:
            return False
        finally:
            new.unlink(missing_ok=True)

    def _add(self, kept: Path, digest: str, source: Source) -> bool:
        """Fetch a blob into the folder, or wait until another has; False if it will not be there."""
        part = kept.with_name(kept.name + ".part")
        out = _alone(part)
        if out is None:
            return False
        # `part` goes before its lock does: who waits for that sees then that it is on another file.
        with out:
            try:
                if kept.exists():
                    part.unlink()
                    return True
                size, pieces = source()
                if not self._make_room(size, part):
                    part.unlink()
                    return False
                _write(out, size, pieces, digest)
                part.rename(kept)
                return True
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _make_room(self, size: int, own: Path) -> bool:
        """Whether `size` more bytes fit, after what was not used for longest has made place."""
        if size > self._limit // 2:
            return False  # it would push everything else out
        if size <= self._room:
            self._room -= size
            return True
        # An eighth stays free, for what others add before they count again.
        goal = self._limit - self._limit // 8 - size
        found = sorted(_entries(self._folder / "sha256"))
        total = sum(bytes_ for _, bytes_, path in found if path != own)
        for _, bytes_, path in found:
            if total <= goal:
                break
            if path != own and _dropped(path):
                total -= bytes_
        self._room = self._limit // 64
        return total <= self._limit - size


def _link_or_copy(kept: Path, new: Path) -> None:
    """FileNotFoundError if it is not there, or no more."""
    try:
        os.link(kept, new)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, or another user's file
        shutil.copyfile(kept, new)


def _write(out: BinaryIO, size: int, pieces: Iterator[bytes], digest: str) -> None:
    out.truncate(0)
    out.truncate(size)  # its full size from now on, so that others count it
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece)
        out.write(piece)
    out.flush()
    if (found := "sha256:" + sha.hexdigest()) != digest:
        raise corrupt(digest, found)


def _alone(part: Path) -> BinaryIO | None:
    """`part` opened and locked; None if whoever has it stands still."""
    while True:
        out = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        if not _locked(out, part):
            out.close()
            return None
        try:
            if os.path.samestat(os.fstat(out.fileno()), part.stat()):
                return out
        except FileNotFoundError:
            pass
        out.close()  # finished or given up since it was opened


def _locked(out: BinaryIO, part: Path) -> bool:
    """Wait for the lock while whoever holds it gets on."""
    seen, since = -1, time.monotonic()
    while True:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            written = os.fstat(out.fileno()).st_mtime_ns
            if written != seen:
                seen, since = written, time.monotonic()
            elif time.monotonic() - since > STALLED_S:
                log.warning("another process fetches %s and does not get on", part)
                return False
        time.sleep(LOOK_S)


def _entries(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """(when it was used, bytes, path) of every file."""
    for path in folder.glob("??/*"):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        yield found.st_mtime, found.st_size, path


def _dropped(path: Path) -> bool:
    """Remove a file, unless it is a blob on its way."""
    try:
        if path.suffix == ".part":
            with path.open("rb") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
        else:
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True
