"""Resumable uploads to the store in a folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from services.finetune.errors import InvalidArgument
from services.finetune.store.checks import check_digest, check_offset, check_size, disk_errors
from services.finetune.store.disk import hash_file
from services.finetune.store.port import Blob, Link

if TYPE_CHECKING:
    from services.finetune.store.file import FileStore

_HASHERS = ThreadPoolExecutor(4, thread_name_prefix="hash")


class FileUpload:
    """See Upload."""

    def __init__(self, store: FileStore, folder: Path) -> None:
        about = json.loads((folder / "about.json").read_text())
        self.digest: str = about["digest"]
        self.size: int = about["size"]
        self._store = store
        self._folder = folder
        self._data = folder / "data"
        # The running hash knows an upload that was never cut; a resumed one is read once at the end.
        self._hashed = 0
        self._sha = hashlib.sha256()
        self._hashing: Future[None] | None = None
        self._committed = 0
        self.flush()

    @property
    def committed(self) -> int:
        return self._committed

    def write(self, offset: int, data: bytes) -> None:
        with disk_errors(self._store.root), self._data.open("r+b", buffering=0) as out:
            fcntl.flock(out, fcntl.LOCK_EX)  # of two streams of one upload only one may find its offset right
            end = out.seek(0, os.SEEK_END)
            check_offset(offset, end)
            try:
                left = memoryview(data)
                while left:
                    left = left[out.write(left) :]
            except OSError:
                # A torn chunk is cut off again: the next one begins where this one should have.
                out.truncate(end)
                raise
        if self._hashed == offset:
            self._settle()
            self._hashing = _HASHERS.submit(self._sha.update, data)
            self._hashed += len(data)

    def flush(self) -> None:
        with disk_errors(self._store.root), self._data.open("rb") as data:
            size = os.fstat(data.fileno()).st_size  # before the sync: bytes that arrive during it may not be in it
            os.fsync(data.fileno())
            self._committed = size

    def links(self, count: int, valid_s: int) -> Sequence[Link]:
        return ()

    def finish(self) -> Blob:
        try:
            self.flush()
            check_size(self._committed, self.size)
            check_digest(self._whole_digest(), self.digest)
        except InvalidArgument:
            self._drop()
            raise
        with disk_errors(self._store.root):
            self._store.keep_blob(self._data, self.digest)
        self._drop()
        return Blob(self.digest, self.size)

    def _settle(self) -> None:
        """Wait until the chunk before is hashed: it is hashed while the next one comes."""
        if self._hashing is not None:
            self._hashing.result()

    def _whole_digest(self) -> str:
        self._settle()
        if self._hashed == self.size:
            return "sha256:" + self._sha.hexdigest()
        with disk_errors(self._store.root):
            return hash_file(self._data)

    def _drop(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
