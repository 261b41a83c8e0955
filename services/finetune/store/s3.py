"""The store in an S3 bucket, by the MinIO SDK. Any server will do that honours If-Match and If-None-Match.

    <prefix>/blobs/sha256/ab/<hex>   <prefix>/objects/<key>   <prefix>/uploads/<id>.json   <prefix>/staging/<id>

A blob appears under its own key only when its digest is verified. Uploads are in s3_upload.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import io
import json
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import urllib3
from minio.datatypes import Part
from minio.error import MinioException, S3Error

from services.finetune.errors import (
    FailedPrecondition,
    PermissionDenied,
    QuartetError,
    ResourceExhausted,
    Unavailable,
)
from services.finetune.store import s3_garbage, s3_stream
from services.finetune.store.cache import Cache
from services.finetune.store.checks import (
    PIECE_BYTES,
    blob_name,
    check_key,
    check_prefix,
    check_same,
    check_upload_id,
    cut_short,
    disk_errors,
    lost_race,
    no_blob,
)
from services.finetune.store.disk import write_verified
from services.finetune.store.port import Blob, Entry, Leftover, Object, Stored, Upload
from services.finetune.store.s3_client import connect
from services.finetune.store.s3_upload import S3Upload, part_size

FILE_PART_BYTES = 16 << 20
PARTS_IN_FLIGHT = 3
MISSING = ("NoSuchKey", "NoSuchUpload")
LOST = ("PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey")
REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed")
FULL = ("XMinioStorageFull", "InsufficientStorage", "QuotaExceeded")
READ_TRIES = 4


class S3Store:
    """See Store. Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."""

    def __init__(self, uri: str, cache: Cache | None = None) -> None:
        self.uri = uri
        self._cache = cache
        parts = urlsplit(uri)
        self.bucket = parts.netloc
        self.prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        # Small requests give up in seconds, so that a caller learns soon of a dead store; moving data may take longer.
        self.quick = connect(parts, read_s=4, reads=1)
        self.patient = connect(parts, read_s=120, reads=3)

    # ------------------------------------------------------------------------------------------ blobs

    def stat_blob(self, digest: str) -> Blob | None:
        size = self.stat_size(self.blob_key(digest))
        return None if size is None else Blob(digest, size)

    def touch_blob(self, digest: str) -> Blob | None:
        return s3_garbage.touch(self, digest)

    def put_blob(self, data: bytes) -> Blob:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if self.touch_blob(digest) is None:
            with self.errors():
                self.patient.put_object(self.bucket, self.blob_key(digest), io.BytesIO(data), len(data))
        return Blob(digest, len(data))

    def put_file(self, path: Path) -> Blob:
        # Hashed before it is sent: then its key is known, and an equal blob need not be sent at all.
        with path.open("rb") as source:
            digest = "sha256:" + hashlib.file_digest(source, "sha256").hexdigest()
            size = source.tell()
            source.seek(0)
            if self.touch_blob(digest) is None:
                self._send_file(source, size, digest)
        return Blob(digest, size)

    def put_stream(self, stream_id: str, size: int, pieces: Iterable[bytes | memoryview]) -> Blob:
        return s3_stream.put_stream(self, stream_id, size, pieces)

    def drop_streams(self, prefix: str) -> None:
        s3_stream.drop_streams(self, prefix)

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        at = 0
        try:
            for piece in self.read(self.blob_key(digest), offset, len(buffer)):
                buffer[at : at + len(piece)] = piece
                at += len(piece)
        except Unavailable:
            # Only now, as most ranges are there: one question less for each of them.
            blob = self.stat_blob(digest)
            if blob is None:
                raise no_blob(digest) from None
            if blob.size < offset + len(buffer):
                raise cut_short(digest) from None
            raise

    def read_blob(self, digest: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        blob = self.stat_blob(digest)
        if blob is None:
            raise no_blob(digest)
        left = max(blob.size - offset, 0)
        return self.read(self.blob_key(digest), offset, left if length is None else min(length, left))

    def link_blob(self, digest: str, valid_s: int) -> str:
        return self.quick.get_presigned_url("GET", self.bucket, self.blob_key(digest), timedelta(seconds=valid_s))

    def fetch_blob(self, digest: str, path: Path) -> None:
        with disk_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            if self._cache is None or not self._cache.fetch(digest, path, lambda: self._source(digest)):
                write_verified(self.read_blob(digest), path, digest)

    def _source(self, digest: str) -> tuple[int, Iterator[bytes]]:
        blob = self.stat_blob(digest)
        if blob is None:
            raise no_blob(digest)
        return blob.size, self.read(self.blob_key(digest), 0, blob.size)

    def blob_key(self, digest: str) -> str:
        """Where a blob lies. InvalidArgument (DIGEST_MALFORMED)."""
        return f"{self.prefix}blobs/{blob_name(digest)}"

    def _send_file(self, source: BinaryIO, size: int, digest: str) -> None:
        """Send a file in parts straight to its blob's key: it appears there only once all parts are complete, and
        they are completed only if what was sent hashes to what was read before."""
        key, part_bytes = self.blob_key(digest), part_size(FILE_PART_BYTES, size)
        if size <= part_bytes:
            data = source.read(size)
            check_unchanged(hashlib.sha256(data).hexdigest(), digest)
            with self.errors():
                self.patient.put_object(self.bucket, key, io.BytesIO(data), len(data))
            return
        with self.errors():
            # From here on calls below put_object, which cannot hold an upload open until its bytes are verified.
            multipart = self.patient._create_multipart_upload(self.bucket, key, {})
        try:
            parts, found = self._send_parts(source, key, multipart, part_bytes)
            check_unchanged(found, digest)
            with self.errors():
                self.patient._complete_multipart_upload(self.bucket, key, multipart, parts)
        except BaseException:
            with contextlib.suppress(QuartetError), self.errors(expect=MISSING):
                self.patient._abort_multipart_upload(self.bucket, key, multipart)
            raise

    def _send_parts(self, source: BinaryIO, key: str, multipart: str, part_bytes: int) -> tuple[list[Part], str]:
        """The parts and the hash of what was sent. A few parts travel at once; no more are held in memory."""
        sha, flying, parts = hashlib.sha256(), deque[Future[str]](), list[Part]()
        with self.errors(), ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
            number = 0
            while (data := source.read(part_bytes)) or flying:
                if data:
                    number += 1
                    sha.update(data)
                    flying.append(pool.submit(self.patient._upload_part, self.bucket, key, data, {}, multipart, number))
                if not data or len(flying) >= PARTS_IN_FLIGHT:
                    parts.append(Part(len(parts) + 1, flying.popleft().result()))
        return parts, sha.hexdigest()

    def read(self, key: str, offset: int, length: int) -> Iterator[bytes]:
        """Stream a part of an S3 object; a cut connection is taken up again where it broke."""
        tries = 0
        while length > 0:
            try:
                for piece in self._read_once(key, offset, length):
                    offset, length, tries = offset + len(piece), length - len(piece), 0
                    yield piece
                if length > 0:
                    raise Unavailable(f"the store {self.uri} cut {key} short", reason="STORE_UNREACHABLE")
            except Unavailable:
                tries += 1
                if tries == READ_TRIES:
                    raise
                time.sleep(0.2 * 2**tries)

    def _read_once(self, key: str, offset: int, length: int) -> Iterator[bytes]:
        with self.errors():
            answer = self.patient.get_object(self.bucket, key, offset, length)
            try:
                yield from answer.stream(PIECE_BYTES)
            finally:
                answer.close()
                answer.release_conn()

    # ------------------------------------------------------------------------------------------ small objects

    def get(self, key: str) -> Object | None:
        return self._get(key, f"{self.prefix}objects/{check_key(key)}")

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        full = f"{self.prefix}objects/{check_key(key)}"
        if if_absent:
            return self._put_if(key, full, data, {"If-None-Match": "*"})
        if if_match is not None:
            return self._put_if(key, full, data, {"If-Match": f'"{if_match}"'})
        with self.errors():
            return str(self.quick.put_object(self.bucket, full, io.BytesIO(data), len(data)).etag).strip('"')

    def delete(self, key: str, *, if_match: str | None = None) -> None:
        full = f"{self.prefix}objects/{check_key(key)}"
        if if_match is None:
            self.drop(full)
            return
        present = self.get(key)
        if present is None or present.etag != if_match:
            raise lost_race(key)
        try:
            with self.errors(expect=LOST):
                # As in _put_if: remove_object takes no headers. Where a server ignores the condition, the check above
                # is all there is.
                self.quick._execute("DELETE", self.bucket, full, headers={"If-Match": f'"{if_match}"'})
        except S3Error as error:
            raise lost_race(key) from error

    def list(self, prefix: str, *, start_after: str = "", limit: int = 1000) -> list[Entry]:
        # All keys are asked for and sorted here: some servers (SeaweedFS) list folder by folder, so "a/x/1" comes before
        # "a/x.json", and they would leave keys out of a page that begins in between.
        base, after = f"{self.prefix}objects/", start_after.encode()
        with self.errors():
            listed = self.quick.list_objects(self.bucket, base + check_prefix(prefix), recursive=True)
            entries = (
                Entry(
                    str(o.object_name).removeprefix(base), str(o.etag).strip('"'), s3_garbage.seconds(o.last_modified)
                )
                for o in listed
            )
            wanted = (e for e in entries if e.key.encode() > after)
            return heapq.nsmallest(limit, wanted, key=lambda e: e.key.encode())

    def _get(self, key: str, full: str) -> Object | None:
        try:
            with self.errors(expect=MISSING):
                answer = self.quick.get_object(self.bucket, full)
                try:
                    return Object(key, answer.read(), answer.headers["ETag"].strip('"'))
                finally:
                    answer.close()
                    answer.release_conn()
        except S3Error:
            return None

    def _put_if(self, key: str, full: str, data: bytes, condition: dict[str, str]) -> str:
        """A put under a condition. Each carries a number of its own: if its answer is lost and the SDK sends it again,
        the second is refused by the success of the first, and the number tells that it was ours."""
        mark = uuid.uuid4().hex
        headers: dict[str, Any] = {**condition, "x-amz-meta-put": mark}
        try:
            with self.errors(expect=LOST):
                # The SDK's put_object has no conditions; this is the call below it, which sends headers as they are.
                made = self.quick._put_object(self.bucket, full, data, headers)
                return str(made.etag).strip('"')
        except S3Error as error:
            with contextlib.suppress(S3Error), self.errors(expect=MISSING):
                present = self.quick.stat_object(self.bucket, full)
                if (present.metadata or {}).get("x-amz-meta-put") == mark:
                    return str(present.etag).strip('"')
            raise lost_race(key) from error

    # ------------------------------------------------------------------------------------------ garbage

    def clock_s(self) -> float:
        self.put("garbage/clock.json", b"{}")
        with self.errors():
            about = self.quick.stat_object(self.bucket, f"{self.prefix}objects/garbage/clock.json")
        return s3_garbage.seconds(about.last_modified)

    def list_blobs(self) -> Iterator[Stored]:
        return s3_garbage.list_blobs(self)

    def drop_blobs(self, digests: Sequence[str], before_s: float) -> int:
        return s3_garbage.drop_blobs(self, digests, before_s)

    def leftovers(self, before_s: float, drop: bool) -> Iterator[Leftover]:
        return s3_garbage.leftovers(self, before_s, drop)

    # ------------------------------------------------------------------------------------------ uploads

    def begin_upload(self, upload_id: str, digest: str, size: int) -> Upload:
        self.blob_key(digest)
        upload = self.find_upload(upload_id)
        if upload is None:
            with self.errors():
                staging = f"{self.prefix}staging/{upload_id}"
                multipart = self.quick._create_multipart_upload(self.bucket, staging, {})
            about = json.dumps({"digest": digest, "size": size, "multipart": multipart}).encode()
            record = self._upload_key(upload_id)
            try:
                self._put_if(record, record, about, {"If-None-Match": "*"})
            except QuartetError:
                # Another has begun it at the same time, or the store went away: an open multipart costs space.
                with contextlib.suppress(QuartetError, S3Error), self.errors(expect=MISSING):
                    self.quick._abort_multipart_upload(self.bucket, staging, multipart)
            upload = self.find_upload(upload_id)
        if upload is None:
            raise Unavailable(f"{self.uri} keeps no record of upload {upload_id}", reason="STORE_UNREACHABLE")
        check_same((upload.digest, upload.size), (digest, size))
        return upload

    def find_upload(self, upload_id: str) -> Upload | None:
        record = self._upload_key(check_upload_id(upload_id))
        about = self._get(record, record)
        if about is None:
            return None
        try:
            return S3Upload(self, record, f"{self.prefix}staging/{upload_id}", json.loads(about.data))
        except LookupError:
            # The bucket's rules have dropped the parts (many expire them after days): the upload is no more.
            self.drop(record)
            return None

    def _upload_key(self, upload_id: str) -> str:
        return f"{self.prefix}uploads/{upload_id}.json"

    # ------------------------------------------------------------------------------------------ S3

    def list_files(self) -> Iterator[tuple[str, int]]:
        """(key, size in bytes) of every S3 object below the prefix, whoever wrote it there."""
        with self.errors():
            for entry in self.quick.list_objects(self.bucket, self.prefix, recursive=True):
                if not entry.is_dir:
                    yield str(entry.object_name), int(entry.size or 0)

    def stat_size(self, full: str) -> int | None:
        """An S3 object's size in bytes, or None if there is none."""
        try:
            with self.errors(expect=MISSING):
                return int(self.quick.stat_object(self.bucket, full).size or 0)
        except S3Error:
            return None

    def drop(self, full: str) -> None:
        """Remove an S3 object, if it is there."""
        with self.errors():
            self.quick.remove_object(self.bucket, full)

    @contextlib.contextmanager
    def errors(self, expect: tuple[str, ...] = ()) -> Iterator[None]:
        """Turn what the SDK says into our words, but for S3Errors with a code in `expect`."""
        try:
            yield
        except S3Error as error:
            if error.code in expect:
                raise
            raise self._translated(str(error.code)) from error
        except QuartetError:  # some of ours are an OSError too
            raise
        except (MinioException, urllib3.exceptions.HTTPError, OSError) as error:
            raise Unavailable(
                f"the store {self.uri} does not answer; check that it runs and that its endpoint is right",
                reason="STORE_UNREACHABLE",
            ) from error

    def _translated(self, code: str) -> QuartetError:
        if code in REFUSED:
            hint = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and this machine's clock"
            return PermissionDenied(f"the store {self.uri} refuses ({code}); {hint}", reason="STORE_REFUSED")
        if code == "NoSuchBucket":
            return FailedPrecondition(f"bucket {self.bucket!r} is not there; make it first", reason="BUCKET_NOT_FOUND")
        if code in FULL:
            return ResourceExhausted(f"the store {self.uri} is full; free some space", reason="DISK_FULL")
        return Unavailable(f"the store {self.uri} fails ({code}); try again later", reason="STORE_UNREACHABLE")


def check_unchanged(found: str, digest: str) -> None:
    """FailedPrecondition (FILE_CHANGED) if a file was written to between being hashed and being sent."""
    if "sha256:" + found != digest:
        raise FailedPrecondition("the file changed while it was stored; try again", reason="FILE_CHANGED")
