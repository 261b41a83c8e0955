"""What the object store must do. Two adapters exist, file and S3; tests/finetune/store runs one suite on both.

Blobs are bytes named by their sha256 and never change. Objects are small, have a key, and are written under conditions.
A digest is written ``sha256:<64 hex>`` everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored blob: its digest and size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Object:
    """A small object as read: `etag` names this very version."""

    key: str
    data: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a listing."""

    key: str
    etag: str
    time_s: float
    """When it was written, by the store's clock (seconds since 1970)."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob as the store lists it: `time_s` is when it was stored or touched last, by the store's clock."""

    digest: str
    size: int
    time_s: float


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a cut write left behind: of an "upload" or a "temporary" file, its bytes."""

    kind: Literal["upload", "temporary"]
    key: str
    size: int


@dataclass(frozen=True, slots=True)
class Link:
    """Where one range of an upload, in bytes, can be PUT by whoever has the URL."""

    offset: int
    size: int
    url: str


class Upload(Protocol):
    """A blob on its way in, kept across restarts until it is finished."""

    digest: str
    size: int

    @property
    def committed(self) -> int:
        """Bytes that would survive a crash now."""

    def write(self, offset: int, data: bytes) -> None:
        """Append `data`; `offset` must be where the bytes so far end, else OutOfRange (OFFSET_WRONG)."""

    def flush(self) -> None:
        """Make all bytes written so far committed, as far as the store can (S3 keeps whole parts only). Another thread may
        write meanwhile."""

    def links(self, count: int, valid_s: int) -> Sequence[Link]:
        """Links for at most `count` ranges from `committed` on, for so many seconds; none where the store has no such
        thing. What arrives by them is committed as soon as all before it has, as a later find_upload tells."""

    def finish(self) -> Blob:
        """Verify size and digest and keep the blob. InvalidArgument (SIZE_MISMATCH, DIGEST_MISMATCH) drops it all."""


class Store(Protocol):
    """An object store. Every method raises Unavailable (STORE_UNREACHABLE) when the store does not answer and
    ResourceExhausted (DISK_FULL) when it is full."""

    uri: str

    def stat_blob(self, digest: str) -> Blob | None:
        """The blob, or None if it is not there."""

    def touch_blob(self, digest: str) -> Blob | None:
        """As stat_blob, and the blob counts as stored now: whoever is about to name one that was there before touches it,
        or it might be dropped meanwhile as garbage."""

    def put_blob(self, data: bytes) -> Blob:
        """Keep bytes that are in memory. A blob that is there already is touched."""

    def put_file(self, path: Path) -> Blob:
        """Keep a file's bytes, streamed; nothing is visible before all are there. A blob that is there is touched."""

    def put_stream(self, stream_id: str, size: int, pieces: Iterable[bytes | memoryview]) -> Blob:
        """Keep `size` bytes as they come, whose digest nobody knows yet; nothing is visible before all are there, and what
        `pieces` raises leaves nothing behind. A piece may be changed once the next is asked for. One writer an id.
        InvalidArgument (SIZE_MISMATCH)."""

    def drop_streams(self, prefix: str) -> None:
        """Remove what put_stream left behind where its process was killed, under all ids that begin so."""

    def read_into(self, digest: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the blob's bytes from `offset` on. NotFound (BLOB_NOT_FOUND), DataLoss (BLOB_CORRUPT) if the
        blob ends before that."""

    def read_blob(self, digest: str, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Stream a blob's bytes in pieces of at most 1 MiB. NotFound (BLOB_NOT_FOUND)."""

    def link_blob(self, digest: str, valid_s: int) -> str:
        """Where whoever has this URL can GET the blob, by ranges too, for so many seconds; "" where the store has no such
        thing. Whether the blob is there is not looked up."""

    def fetch_blob(self, digest: str, path: Path) -> None:
        """Make `path` a verified copy of the blob (a hard link where the store is on the same disk); parent folders
        are made. `path` must never be written to. NotFound (BLOB_NOT_FOUND), DataLoss (BLOB_CORRUPT)."""

    def begin_upload(self, upload_id: str, digest: str, size: int) -> Upload:
        """Start or go on with an upload. The id is the caller's; the same id goes on where the last one stopped."""

    def find_upload(self, upload_id: str) -> Upload | None:
        """A begun, unfinished upload."""

    def get(self, key: str) -> Object | None:
        """A small object, or None."""

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        """Write a small object whole and durably; the new etag. Aborted (PRECONDITION_FAILED) if `if_match` is not
        the present etag, or `if_absent` and the key exists."""

    def delete(self, key: str, *, if_match: str | None = None) -> None:
        """Remove an object; a missing one is no error unless `if_match` is given (Aborted)."""

    def list(self, prefix: str, *, start_after: str = "", limit: int = 1000) -> list[Entry]:
        """At most `limit` entries with that key prefix after `start_after`, in order of their keys (bytewise)."""

    # What only the collector of garbage uses (services.finetune.store.garbage).

    def clock_s(self) -> float:
        """Now, in seconds since 1970, by the clock that dates blobs and objects."""

    def list_blobs(self) -> Iterator[Stored]:
        """All blobs, in no order."""

    def drop_blobs(self, digests: Sequence[str], before_s: float) -> int:
        """Remove those of these blobs that were neither stored nor touched since; how many were removed. Who puts or
        touches one at the same time keeps it, or is told that it is gone. One caller at a time."""

    def leftovers(self, before_s: float, drop: bool) -> Iterator[Leftover]:
        """Uploads and temporary files that nobody wrote to since; with `drop` they are removed."""
