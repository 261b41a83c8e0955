"""A blob of unknown digest streamed into a bucket.

S3 wants an object's key before its bytes, a blob's key is its digest, and that is known at the end. So the parts go to
the staging area, and the server itself copies what they became to the blob's key.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from minio.commonconfig import CopySource
from minio.datatypes import Part
from minio.error import S3Error

from services.finetune.errors import QuartetError
from services.finetune.store.checks import check_size, check_upload_id
from services.finetune.store.port import Blob
from services.finetune.store.s3_upload import part_size

if TYPE_CHECKING:
    from services.finetune.store.s3 import S3Store

PART_BYTES = 16 << 20
PARTS_IN_FLIGHT = 3


def put_stream(store: S3Store, stream_id: str, size: int, pieces: Iterable[bytes | memoryview]) -> Blob:
    """See Store.put_stream. Memory: PARTS_IN_FLIGHT + 1 parts of 16 MiB, or of a ten-thousandth of `size`."""
    staging, part_bytes = _key(store, check_upload_id(stream_id)), part_size(PART_BYTES, size)
    parts = _parts(pieces, part_bytes)
    if size <= part_bytes:
        data = b"".join(parts)
        check_size(len(data), size)
        return store.put_blob(data)
    with store.errors():
        multipart = store.quick._create_multipart_upload(store.bucket, staging, {})
    try:
        digest, found, sent = _send(store, staging, multipart, parts)
        check_size(found, size)
        if store.touch_blob(digest) is None:
            with store.errors():
                store.patient._complete_multipart_upload(store.bucket, staging, multipart, sent)
                store.patient.copy_object(store.bucket, store.blob_key(digest), CopySource(store.bucket, staging))
    finally:
        # What cannot be removed now only costs space until drop_streams.
        with contextlib.suppress(QuartetError):
            _abort(store, staging, multipart)
            store.drop(staging)
    return Blob(digest, size)


def drop_streams(store: S3Store, prefix: str) -> None:
    """See Store.drop_streams."""
    start = _key(store, check_upload_id(prefix))
    with store.errors():
        # Servers part uploads by whole folders and not always by prefix.
        listed = store.quick._list_multipart_uploads(store.bucket, prefix=start)
        for upload in listed.uploads:
            if upload.object_name.startswith(start):
                _abort(store, upload.object_name, str(upload.upload_id))
        for entry in list(store.quick.list_objects(store.bucket, start, recursive=True)):
            store.drop(str(entry.object_name))


def _key(store: S3Store, stream_id: str) -> str:
    return f"{store.prefix}staging/stream-{stream_id}"


def _abort(store: S3Store, staging: str, multipart: str) -> None:
    with contextlib.suppress(S3Error), store.errors(expect=("NoSuchUpload",)):
        store.quick._abort_multipart_upload(store.bucket, staging, multipart)


def _send(store: S3Store, staging: str, multipart: str, parts: Iterator[bytes]) -> tuple[str, int, list[Part]]:
    """(digest, bytes, the parts). A few travel at once, and the next is hashed meanwhile."""
    sha, size, sent = hashlib.sha256(), 0, list[Part]()
    flying = deque[Future[str]]()
    with store.errors(), ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool:
        for number, data in enumerate(parts, 1):
            if len(flying) == PARTS_IN_FLIGHT:
                sent.append(Part(len(sent) + 1, flying.popleft().result()))
            flying.append(pool.submit(store.patient._upload_part, store.bucket, staging, data, {}, multipart, number))
            sha.update(data)
            size += len(data)
        while flying:
            sent.append(Part(len(sent) + 1, flying.popleft().result()))
    return "sha256:" + sha.hexdigest(), size, sent


def _parts(pieces: Iterable[bytes | memoryview], part_bytes: int) -> Iterator[bytes]:
    """The same bytes in pieces of `part_bytes`; the last may be shorter."""
    rest = bytearray()
    for piece in pieces:
        rest += piece
        while len(rest) >= part_bytes:
            yield bytes(memoryview(rest)[:part_bytes])
            del rest[:part_bytes]
    if rest:
        yield bytes(rest)
