"""Uploads of the datasets room: announced by digest and size, resumed after any cut, kept by the store alone."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from services.common.names import parse
from services.finetune.errors import DataLoss, InvalidArgument, NotFound
from services.finetune.store import Link, Store, Upload

UPLOAD = "workspaces/{workspace}/datasets/{dataset}/uploads/{upload}"

CHUNK_BYTES = 1 << 20
FLUSH_BYTES = 8 << 20
DIRECT_FROM_BYTES = 8 << 20
LINKS = 1000
LINK_VALID_S = 3600

_FLUSHERS = ThreadPoolExecutor(8, thread_name_prefix="flush")


@dataclass(frozen=True, slots=True)
class UploadStatus:
    """As the message BlobStatus; sizes in bytes."""

    upload: str
    digest: str
    size: int
    committed: int
    complete: bool
    links: Sequence[Link] = ()


class Uploads:
    """BeginUpload, WriteBlob and GetBlobStatus. Methods block; they may be called from many threads.

    `direct` lets clients send to the store themselves, where it can. `check_dataset` raises NotFound (DATASET_NOT_FOUND)
    unless a dataset has that name.
    """

    def __init__(self, store: Store, check_dataset: Callable[[str], object], direct: bool = True) -> None:
        self._store = store
        self._direct = direct
        self._check_dataset = check_dataset
        # Two streams of one upload must not both pass the check of the offset.
        self._locks = [threading.Lock() for _ in range(64)]

    def begin(self, parent: str, digest: str, size: int, direct: bool = False) -> UploadStatus:
        """BeginUpload."""
        self._check_dataset(parent)
        if size < 0:
            raise InvalidArgument(f"size_bytes: {size} is negative", reason="SIZE_MISMATCH")
        blob = self._store.touch_blob(digest)
        # The id says what was announced, so nothing need be kept about an upload that is complete.
        name = f"{parent}/uploads/{digest.removeprefix('sha256:')}-{size}"
        if blob is None:
            upload = self._store.begin_upload(_upload_id(name), digest, size)
            able = direct and self._direct and size > DIRECT_FROM_BYTES
            links = upload.links(LINKS, LINK_VALID_S) if able else ()
            return UploadStatus(name, digest, size, upload.committed, False, links)
        if blob.size != size:
            raise InvalidArgument(f"{digest} is known and has {blob.size} bytes, not {size}", reason="SIZE_MISMATCH")
        return UploadStatus(name, digest, size, size, True)

    def status(self, name: str) -> UploadStatus:
        """GetBlobStatus."""
        digest, size = _announced(name)
        upload = self._store.find_upload(_upload_id(name))
        if upload is not None:
            return UploadStatus(name, digest, size, upload.committed, False)
        blob = self._store.stat_blob(digest)
        if blob is None or blob.size != size:
            raise _no_upload(name)
        return UploadStatus(name, digest, size, size, True)

    def settle(self, parent: str, digest: str, size: int) -> UploadStatus:
        """The status of an announced file that came to the store by another way; what was sent of it is dropped."""
        name = f"{parent}/uploads/{digest.removeprefix('sha256:')}-{size}"
        upload = self._store.find_upload(_upload_id(name))
        if upload is not None:
            # An upload that ends too soon leaves nothing behind.
            with contextlib.suppress(InvalidArgument):
                upload.finish()
        return self.status(name)

    def open(self, name: str) -> Writing:
        """The upload that a WriteBlob stream names first."""
        _announced(name)
        upload_id = _upload_id(name)
        upload = self._store.find_upload(upload_id)
        if upload is None:
            raise _no_upload(name)
        return Writing(name, upload, self._locks[hash(upload_id) % len(self._locks)])


class Writing:
    """One WriteBlob stream: checks chunks, writes them, makes them durable every 8 MiB."""

    def __init__(self, name: str, upload: Upload, lock: threading.Lock) -> None:
        self._name = name
        self._upload = upload
        self._lock = lock
        self._unflushed = 0
        self._flushing: Future[None] | None = None

    def write(self, offset: int, data: bytes, crc32c: int) -> None:
        """Take one chunk. See WriteBlob for the errors."""
        import google_crc32c

        if len(data) > CHUNK_BYTES:
            raise InvalidArgument(
                f"a chunk has {len(data)} bytes; send {CHUNK_BYTES} at most", reason="CHUNK_TOO_LARGE"
            )
        if google_crc32c.value(data) != crc32c:
            raise DataLoss(
                f"the chunk at {offset} was damaged on its way: its crc32c is wrong; send it again",
                reason="CHUNK_CORRUPT",
                metadata={"offset_bytes": str(offset)},
            )
        if offset + len(data) > self._upload.size:
            raise InvalidArgument(
                f"the chunk ends at {offset + len(data)}, but {self._upload.size} bytes were announced",
                reason="SIZE_MISMATCH",
            )
        with self._lock:
            self._upload.write(offset, data)
        self._unflushed += len(data)
        if self._unflushed >= FLUSH_BYTES:
            # The next chunks are written while the disk takes these.
            self._settle()
            self._unflushed, self._flushing = 0, _FLUSHERS.submit(self._upload.flush)

    def flush(self) -> None:
        """Make what came so far durable."""
        self._settle()
        if self._unflushed:
            self._upload.flush()
            self._unflushed = 0

    def _settle(self) -> None:
        """Wait for a flush that is under way; what it met is raised here."""
        flushing, self._flushing = self._flushing, None
        if flushing is not None:
            flushing.result()

    def status(self) -> UploadStatus:
        """How far the upload has come."""
        return UploadStatus(self._name, self._upload.digest, self._upload.size, self._upload.committed, False)

    def finish(self) -> UploadStatus:
        """Verify and keep the blob."""
        self._settle()
        with self._lock:
            blob = self._upload.finish()
        return UploadStatus(self._name, blob.digest, blob.size, blob.size, True)


def _announced(name: str) -> tuple[str, int]:
    """(digest, size) that an upload's name says."""
    digest, _, size = parse(UPLOAD, name, "upload")["upload"].partition("-")
    if len(digest) != 64 or not size.isdecimal():
        raise _no_upload(name)
    return f"sha256:{digest}", int(size)


def _upload_id(name: str) -> str:
    """The store's id: each dataset has its own upload of the same bytes, so that none can spoil another's."""
    dataset, _, upload = name.partition("/uploads/")
    return f"{hashlib.sha256(dataset.encode()).hexdigest()[:16]}-{upload}"


def _no_upload(name: str) -> NotFound:
    return NotFound(f"there is no upload {name}; begin it first", reason="UPLOAD_NOT_FOUND", metadata={"upload": name})
