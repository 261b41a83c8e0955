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
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

from services.finetune.errors import InvalidArgument
from services.finetune.store import file_stream
from services.finetune.store.checks import (
    PIECE_BYTES,
    blob_name,
    check_digest,
    check_key,
    check_offset,
    check_prefix,
    check_same,
    check_size,
    check_upload_id,
    corrupt,
    cut_short,
    disk_errors,
    lost_race,
    no_blob,
)
from services.finetune.store.port import Blob, Entry, Link, Object, Upload

_HASHERS = ThreadPoolExecutor(4, thread_name_prefix="hash")


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

    def put_blob(self, data: bytes) -> Blob:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if self.stat_blob(digest) is None:
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
        if target.exists():
            path.unlink()
            return
        make_folder(target.parent)
        path.chmod(0o444)
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
            upload = _FileUpload(self, folder)
        check_same((upload.digest, upload.size), (digest, size))
        return upload

    def find_upload(self, upload_id: str) -> Upload | None:
        folder = self.root / "uploads" / check_upload_id(upload_id)
        with disk_errors(self.root):
            begun = (folder / "about.json").exists() and (folder / "data").exists()
            return _FileUpload(self, folder) if begun else None

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
        found = (self.get(key) for key in heapq.nsmallest(limit, wanted, key=str.encode))
        return [Entry(read.key, read.etag) for read in found if read is not None]

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


class _FileUpload:
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


# ---------------------------------------------------------------------------------------------- files


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
