"""Resumable uploads to S3: the parts that arrived are found again by ListParts, so nothing else need remember them."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from minio.commonconfig import CopySource
from minio.datatypes import Part
from minio.error import S3Error

from services.finetune.errors import InvalidArgument, QuartetError
from services.finetune.store.checks import check_digest, check_offset, check_size
from services.finetune.store.port import Blob, Link

if TYPE_CHECKING:
    from services.finetune.store.s3 import S3Store

PART_BYTES = 8 << 20
MAX_PARTS = 10_000


def part_size(least: int, size: int) -> int:
    """Bytes of a part, so that `size` bytes fit into as many parts as S3 allows."""
    return max(least, -(-size // MAX_PARTS))


class S3Upload:
    """See Upload. Parts are committed as they fill; the rest waits in memory until it is a part, or the last one.

    The SDK's calls that begin with _ are those of the S3 API; its public ones hide the upload's id. LookupError if the
    parts are not there any more.
    """

    def __init__(self, store: S3Store, record: str, staging: str, about: dict[str, Any]) -> None:
        self.digest: str = about["digest"]
        self.size: int = about["size"]
        self._store = store
        self._record = record
        self._staging = staging
        self._multipart: str = about["multipart"]
        self._part_bytes = part_size(PART_BYTES, self.size)
        self._parts: list[Part] = []
        self._stored = 0
        # Set where a finish was cut off after the parts were put together: only the check and the copy are left.
        self._joined = False
        self._hashed = 0
        self._sha = hashlib.sha256()
        self._rest = bytearray()
        self._lock = threading.Lock()
        self._find_parts()

    @property
    def committed(self) -> int:
        return self._stored

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            check_offset(offset, self._stored + len(self._rest))
            if self._hashed == offset:
                self._sha.update(data)
                self._hashed += len(data)
            self._rest += data
            while len(self._rest) >= self._part_bytes:
                self._send(self._part_bytes)

    def flush(self) -> None:
        """S3 takes no small part but the last, so a rest in the middle cannot be kept yet."""
        with self._lock:
            if self._rest and self._stored + len(self._rest) == self.size:
                self._send(len(self._rest))

    def links(self, count: int, valid_s: int) -> Sequence[Link]:
        store, found, at = self._store, list[Link](), self._stored
        while not (self._joined or self._rest) and at < self.size and len(found) < count:
            size = min(self._part_bytes, self.size - at)
            part: dict[str, str | list[str] | tuple[str]] = {
                "partNumber": str(at // self._part_bytes + 1),
                "uploadId": self._multipart,
            }
            url = store.quick.get_presigned_url(
                "PUT", store.bucket, self._staging, timedelta(seconds=valid_s), extra_query_params=part
            )
            found.append(Link(at, size, url))
            at += size
        return found

    def finish(self) -> Blob:
        try:
            check_size(self._stored + len(self._rest), self.size)
            if self._hashed == self.size:
                check_digest("sha256:" + self._sha.hexdigest(), self.digest)
            if self._stored == 0:
                self._store.put_blob(self._checked_rest())
            else:
                self._keep_staged()
        except InvalidArgument:
            self._drop()
            raise
        self._drop()
        return Blob(self.digest, self.size)

    def _find_parts(self) -> None:
        marker = ""
        try:
            while marker != "0":
                with self._store.errors(expect=("NoSuchUpload",)):
                    listed = self._store.quick._list_parts(
                        self._store.bucket, self._staging, self._multipart, part_number_marker=marker or None
                    )
                for part in listed.parts:
                    self._count(part.part_number, int(part.size or 0), str(part.etag).strip('"'))
                marker = str(listed.next_part_number_marker or 0) if listed.is_truncated else "0"
        except S3Error as error:
            size = self._store.stat_size(self._staging)
            if size is None:
                raise LookupError(self._staging) from error
            self._stored, self._joined = size, True

    def _count(self, number: int, size: int, etag: str) -> None:
        """Take a stored part, if it goes on where the last one ended. By links parts come in any order and of any length:
        one behind a gap waits for that, and one of another length is overwritten."""
        wanted = min(self._part_bytes, self.size - self._stored)
        if number == len(self._parts) + 1 and size == wanted:
            self._parts.append(Part(number, etag))
            self._stored += size

    def _send(self, count: int) -> None:
        number = len(self._parts) + 1
        with self._store.errors():
            etag = self._store.patient._upload_part(
                self._store.bucket, self._staging, bytes(self._rest[:count]), {}, self._multipart, number
            )
        del self._rest[:count]
        self._parts.append(Part(number, etag))
        self._stored += count

    def _checked_rest(self) -> bytes:
        data = bytes(self._rest)
        check_digest("sha256:" + hashlib.sha256(data).hexdigest(), self.digest)
        return data

    def _keep_staged(self) -> None:
        """Put the parts together in the staging area, and copy them to the blob's key once they are verified: by the
        running hash if the upload was never cut, else by reading them back."""
        store = self._store
        self.flush()
        if not self._joined:
            with store.errors():
                store.patient._complete_multipart_upload(store.bucket, self._staging, self._multipart, self._parts)
            self._joined = True
        if self._hashed != self.size:
            sha = hashlib.sha256()
            for piece in store.read(self._staging, 0, self.size):
                sha.update(piece)
            check_digest("sha256:" + sha.hexdigest(), self.digest)
        with store.errors():
            source = CopySource(store.bucket, self._staging)
            store.patient.copy_object(store.bucket, store.blob_key(self.digest), source)

    def _drop(self) -> None:
        """Leave nothing behind. What cannot be removed now only costs space, so it is no error of the upload."""
        store = self._store
        with contextlib.suppress(QuartetError, S3Error), store.errors(expect=("NoSuchUpload",)):
            if not self._joined:
                store.quick._abort_multipart_upload(store.bucket, self._staging, self._multipart)
        with contextlib.suppress(QuartetError):
            store.drop(self._staging)
            store.drop(self._record)
