"""What is dropped from an S3 store, beside writers who may want it just then.

S3 deletes without a condition that all servers know, so the two sides tell each other what they do. A collector writes
down which blobs it is about to delete (SWEEP), and then looks at their dates; a writer that finds an old blob renews its
date, and then looks at what is written down. Whoever comes second sees the other (docs/decisions/0057).
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from minio.commonconfig import REPLACE, CopySource
from minio.error import S3Error

from services.finetune.errors import Aborted
from services.finetune.store.checks import TOUCH_AFTER_S
from services.finetune.store.port import Blob, Leftover, Stored

if TYPE_CHECKING:
    from services.finetune.store.s3 import S3Store

SWEEP = "garbage/sweep.json"
BATCH = 100
SWEEP_S = 20.0
"""So long a collector acts on what it wrote down; a request begun then ends long before PATIENCE_S."""
PATIENCE_S = 90.0
"""A collector that was killed has deleted all that it ever will after so many seconds."""
LOOK_S = 0.2


def touch(store: S3Store, digest: str) -> Blob | None:
    """See Store.touch_blob."""
    key = store.blob_key(digest)
    about = _stat(store, key)
    if about is None:
        return None
    if about.last_modified.timestamp() > time.time() - TOUCH_AFTER_S:
        return Blob(digest, int(about.size))
    try:
        with store.errors(expect=("NoSuchKey",)):
            # Onto itself: S3 wants something changed then, and that is its metadata.
            store.patient.copy_object(
                store.bucket,
                key,
                CopySource(store.bucket, key),
                metadata={"touched": uuid.uuid4().hex},
                metadata_directive=REPLACE,
            )
    except S3Error:
        return None
    _wait(store, digest)
    return store.stat_blob(digest)


def _wait(store: S3Store, digest: str) -> None:
    """Until no collector is about to delete the blob."""
    deadline = time.monotonic() + PATIENCE_S
    while (sweep := store.get(SWEEP)) is not None and digest in json.loads(sweep.data)["digests"]:
        if time.monotonic() > deadline:
            with contextlib.suppress(Aborted):
                store.delete(SWEEP, if_match=sweep.etag)
            return
        time.sleep(LOOK_S)


def list_blobs(store: S3Store) -> Iterator[Stored]:
    """See Store."""
    base = f"{store.prefix}blobs/sha256/"
    with store.errors():
        for entry in store.quick.list_objects(store.bucket, base, recursive=True):
            name = str(entry.object_name).rpartition("/")[2]
            yield Stored(f"sha256:{name}", int(entry.size or 0), seconds(entry.last_modified))


def drop_blobs(store: S3Store, digests: Sequence[str], before_s: float) -> int:
    """See Store."""
    left, dropped = list(digests), 0
    while left:
        batch, left = left[:BATCH], left[BATCH:]
        store.put(SWEEP, json.dumps({"digests": batch}).encode())
        until = time.monotonic() + SWEEP_S
        while batch and time.monotonic() < until:
            key = store.blob_key(batch.pop())
            about = _stat(store, key)
            if about is not None and about.last_modified.timestamp() < before_s:
                store.drop(key)
                dropped += 1
        left = batch + left
    # Not after an error: a deletion whose answer was lost may still be on its way.
    store.delete(SWEEP)
    return dropped


def leftovers(store: S3Store, before_s: float, drop: bool) -> Iterator[Leftover]:
    """See Store. Uploads are multipart uploads below the prefix, or their parts once put together; each has a record."""
    under_way = set[str]()
    for key, upload_id, begun_s in list(_multiparts(store)):
        parts = list(_parts(store, key, upload_id))
        if max([begun_s, *(seconds for _, seconds in parts)]) >= before_s:
            under_way.add(key.rpartition("/")[2])
            continue
        if drop:
            with contextlib.suppress(S3Error), store.errors(expect=("NoSuchUpload",)):
                store.quick._abort_multipart_upload(store.bucket, key, upload_id)
        yield Leftover("upload", key.removeprefix(store.prefix), sum(size for size, _ in parts))
    for folder in ("staging", "uploads"):
        with store.errors():
            found = list(store.quick.list_objects(store.bucket, f"{store.prefix}{folder}/", recursive=True))
        for entry in found:
            key = str(entry.object_name)
            name = key.rpartition("/")[2]
            if name.removesuffix(".json") in under_way or seconds(entry.last_modified) >= before_s:
                continue
            if drop:
                store.drop(key)
            if folder == "staging":
                yield Leftover("upload", key.removeprefix(store.prefix), int(entry.size or 0))


def _multiparts(store: S3Store) -> Iterator[tuple[str, str, float]]:
    """(key, upload id, when it was begun) of multipart uploads that nobody has completed."""
    key_marker, id_marker = None, None
    while True:
        with store.errors():
            found = store.quick._list_multipart_uploads(
                store.bucket, prefix=store.prefix, key_marker=key_marker, upload_id_marker=id_marker
            )
        for upload in found.uploads:
            yield str(upload.object_name), str(upload.upload_id), seconds(upload.initiated_time)
        if not found.is_truncated:
            return
        key_marker, id_marker = found.next_key_marker, found.next_upload_id_marker


def _parts(store: S3Store, key: str, upload_id: str) -> Iterator[tuple[int, float]]:
    """(size in bytes, when it was stored) of an upload's parts."""
    marker = ""
    while marker != "0":
        try:
            with store.errors(expect=("NoSuchUpload",)):
                listed = store.quick._list_parts(store.bucket, key, upload_id, part_number_marker=marker or None)
        except S3Error:
            return
        for part in listed.parts:
            yield int(part.size or 0), seconds(part.last_modified)
        marker = str(listed.next_part_number_marker or 0) if listed.is_truncated else "0"


def _stat(store: S3Store, key: str) -> Any:
    try:
        with store.errors(expect=("NoSuchKey",)):
            return store.quick.stat_object(store.bucket, key)
    except S3Error:
        return None


def seconds(time: datetime | None) -> float:
    """Seconds since 1970 of a date that S3 gave."""
    return time.timestamp() if time is not None else 0.0
