"""The store in a folder. Every write is whole or absent: a temporary file, fsync, one rename or link, fsync of the folder.

blobs/sha256/ab/<hex>    read-only
objects/<key>            small objects; the etag is the sha256 of the content
uploads/<id>/{data,about.json}
tmp/
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import heapq
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from services.finetune.errors import InvalidArgument
from services.finetune.store import file_garbage, file_stream
from services.finetune.store.checks import (
    PIECE_BYTES,
    TOUCH_AFTER_S,
    blob_name,
    check_key,
    check_prefix,
    check_same,
    check_upload_id,
    corrupt,
    cut_short,
    disk_errors,
    lost_race,
    no_blob,
)
from services.finetune.store.disk import etag_of, hash_file, link_or_copy, make_folder, sync_folder, write_synced
from services.finetune.store.file_upload import FileUpload
from services.finetune.store.port import Blob, Entry, Leftover, Object, Stored, Upload


class FileStore:
    """See Store. Safe for many processes on one machine. An object's key cannot be a folder of another's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = "file://" + quote(str(root))
        self._verified: dict[str, tuple[int, int, int]] = {}
        with disk_errors(root):
            for folder in ("blobs/sha256", "objects", "uploads", "tmp"):
                make_folder(root / folder)

    # ------------------------------------------------------------------------------------------ blobs

    def stat_blob(self, digest: str) -> Blob | None:
        path = self.blob_path(digest)
        with disk_errors(self.root):
            try:
                return Blob(digest, path.stat().st_size)
            except (FileNotFoundError, NotADirectoryError):
                self._standing()
                return None

    def touch_blob(self, digest: str) -> Blob | None:
        path = self.blob_path(digest)
        with disk_errors(self.root):
            try:
                found = path.stat()
                if found.st_mtime < time.time() - TOUCH_AFTER_S:
                    with self._lock():
                        os.utime(path)
                return Blob(digest, found.st_size)
            except (FileNotFoundError, NotADirectoryError):
                self._standing()
                return None

    def put_blob(self, data: bytes) -> Blob:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if self.touch_blob(digest) is None:
            with disk_errors(self.root), self._temporary() as path:
                write_synced(path, data)
                self.keep_blob(path, digest)
        return Blob(digest, len(data))

    def put_file(self, path: Path) -> Blob:
        # Hashed while it is copied, so a file that changes meanwhile cannot get a wrong name.
        sha, size = hashlib.sha256(), 0
        with path.open("rb") as source, disk_errors(self.root), self._temporary() as copy:
            with copy.open("wb") as out:
                while piece := source.read(PIECE_BYTES):
                    sha.update(piece)
                    size += len(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            digest = "sha256:" + sha.hexdigest()
            self.keep_blob(copy, digest)
        return Blob(digest, size)

    def put_stream(self, stream_id: str, size: int, pieces: Iterable[bytes | memoryview]) -> Blob:
        return file_stream.put_stream(self, stream_id, size, pieces)

    def drop_streams(self, prefix: str) -> None:
        file_stream.drop_streams(self.root, prefix)

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        path = self.blob_path(digest)
        if self.stat_blob(digest) is None:
            raise no_blob(digest)
        with disk_errors(self.root), path.open("rb", buffering=0) as source:
            while buffer and (count := os.preadv(source.fileno(), [buffer], offset)):
                offset, buffer = offset + count, buffer[count:]
        if buffer:
            raise cut_short(digest)

    def read_blob(self, digest: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        if self.stat_blob(digest) is None:
            raise no_blob(digest)
        return self._read(self.blob_path(digest), offset, length)

    def link_blob(self, digest: str, valid_s: int) -> str:
        return ""

    def fetch_blob(self, digest: str, path: Path) -> None:
        blob = self.blob_path(digest)
        if self.stat_blob(digest) is None:
            raise no_blob(digest)
        self._verify(digest, blob)
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Never written in place: `path` may be a link to a blob already, and others may fetch to it now.
            new = path.parent / f".{uuid.uuid4().hex}"
            try:
                link_or_copy(blob, new, digest)
                new.replace(path)
            finally:
                # Renaming one link of a file over another does nothing, so `new` may still be there.
                new.unlink(missing_ok=True)

    def blob_path(self, digest: str) -> Path:
        """Where a blob lies. InvalidArgument (DIGEST_MALFORMED)."""
        return self.root / "blobs" / blob_name(digest)

    def keep_blob(self, path: Path, digest: str) -> None:
        """Move a synced temporary file into place."""
        target = self.blob_path(digest)
        if self.touch_blob(digest) is not None:
            path.unlink()
            return
        make_folder(target.parent)
        path.chmod(0o444)
        os.utime(path)  # an upload may have got its last byte long ago
        path.rename(target)
        sync_folder(target.parent)

    def _read(self, path: Path, offset: int, length: int | None) -> Iterator[bytes]:
        with disk_errors(self.root), path.open("rb") as source:
            source.seek(offset)
            left = length if length is not None else 1 << 62
            while left > 0 and (piece := source.read(min(PIECE_BYTES, left))):
                left -= len(piece)
                yield piece

    def _verify(self, digest: str, blob: Path) -> None:
        # Hashing gigabytes for each hard link would be waste: a file is hashed again only when it changed.
        with disk_errors(self.root):
            stat = blob.stat()
            mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._verified.get(digest) == mark:
                return
            found = hash_file(blob)
        if found != digest:
            raise corrupt(digest, found)
        self._verified[digest] = mark

    # ------------------------------------------------------------------------------------------ garbage

    def clock_s(self) -> float:
        return time.time()

    def list_blobs(self) -> Iterator[Stored]:
        with disk_errors(self.root):
            yield from file_garbage.list_blobs(self.root)

    def drop_blobs(self, digests: Sequence[str], before_s: float) -> int:
        dropped = 0
        for digest in digests:
            path = self.blob_path(digest)
            # The lock is touch_blob's too: a touch comes before the look at the time, or finds the blob gone.
            with disk_errors(self.root), contextlib.suppress(FileNotFoundError), self._lock():
                if path.stat().st_mtime < before_s:
                    path.unlink()
                    dropped += 1
        return dropped

    def leftovers(self, before_s: float, drop: bool) -> Iterator[Leftover]:
        with disk_errors(self.root):
            yield from file_garbage.leftovers(self.root, before_s, drop)

    # ------------------------------------------------------------------------------------------ uploads

    def begin_upload(self, upload_id: str, digest: str, size: int) -> Upload:
        self.blob_path(digest)
        folder = self.root / "uploads" / check_upload_id(upload_id)
        with disk_errors(self.root):
            if not (folder / "about.json").exists():
                make_folder(folder)
                with self._temporary() as path:
                    write_synced(path, json.dumps({"digest": digest, "size": size}).encode())
                    path.rename(folder / "about.json")
            (folder / "data").touch()
            sync_folder(folder)
            upload = FileUpload(self, folder)
        check_same((upload.digest, upload.size), (digest, size))
        return upload

    def find_upload(self, upload_id: str) -> Upload | None:
        folder = self.root / "uploads" / check_upload_id(upload_id)
        with disk_errors(self.root):
            begun = (folder / "about.json").exists() and (folder / "data").exists()
            return FileUpload(self, folder) if begun else None

    # ------------------------------------------------------------------------------------------ small objects

    def get(self, key: str) -> Object | None:
        path = self._object_path(key)
        with disk_errors(self.root):
            try:
                data = path.read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                self._standing()
                return None
        return Object(key, data, etag_of(data))

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        path = self._object_path(key)
        with disk_errors(self.root), self._temporary() as new:
            write_synced(new, data)
            try:
                make_folder(path.parent)
                self._place(new, path, key, if_match, if_absent)
            except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
                raise InvalidArgument(
                    f"{key}: one object's key cannot be a folder of another's", reason="KEY_MALFORMED"
                ) from error
            sync_folder(path.parent)
        return etag_of(data)

    def _place(self, new: Path, path: Path, key: str, if_match: str | None, if_absent: bool) -> None:
        if if_absent:
            try:
                os.link(new, path)  # the one atomic "create unless it exists" that also carries the content
            except FileExistsError as error:
                raise lost_race(key) from error
            return
        with self._lock():  # a put without a condition takes it too, or a conditional one could undo it unseen
            if if_match is not None:
                self._match(key, if_match)
            new.rename(path)

    def delete(self, key: str, *, if_match: str | None = None) -> None:
        path = self._object_path(key)
        with disk_errors(self.root), self._lock():
            if if_match is not None:
                self._match(key, if_match)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                path.unlink()
                sync_folder(path.parent)

    def list(self, prefix: str, *, start_after: str = "", limit: int = 1000) -> list[Entry]:
        base = self.root / "objects"
        folder = base / check_prefix(prefix).rpartition("/")[0]
        walked = (os.path.relpath(os.path.join(at, name), base) for at, _, names in os.walk(folder) for name in names)
        with disk_errors(self.root):
            self._standing()
        after = start_after.encode()
        wanted = (k for k in walked if k.startswith(prefix) and k.encode() > after)
        return [e for key in heapq.nsmallest(limit, wanted, key=str.encode) if (e := self._entry(key)) is not None]

    def _entry(self, key: str) -> Entry | None:
        with contextlib.suppress(FileNotFoundError):
            time_s = self._object_path(key).stat().st_mtime
            read = self.get(key)
            return Entry(key, read.etag, time_s) if read is not None else None
        return None

    def _standing(self) -> None:
        """Nothing is absent from a store that is gone itself: then an OSError says so."""
        (self.root / "objects").stat()

    def _object_path(self, key: str) -> Path:
        return self.root.joinpath("objects", *check_key(key).split("/"))

    def _match(self, key: str, etag: str) -> None:
        present = self.get(key)
        if present is None or present.etag != etag:
            raise lost_race(key)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.root / "tmp" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = self.root / "tmp" / uuid.uuid4().hex
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
