"""Blobs of unknown digest, on both adapters: streamed in whole or not at all, and read in ranges."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.finetune.errors import DataLoss, InvalidArgument, NotFound
from services.finetune.store import Store, open_store
from services.finetune.store.file import FileStore
from services.finetune.store.s3 import S3Store

MIB = 1 << 20


def leftovers(store: Store) -> list[str]:
    """What lies in the store's places for unfinished things."""
    if isinstance(store, FileStore):
        return [p.name for p in (store.root / "tmp").iterdir() if p.name != "lock"]
    assert isinstance(store, S3Store)
    open_ones = store.quick._list_multipart_uploads(store.bucket, prefix=f"{store.prefix}staging/").uploads
    staged = [key for key, _ in store.list_files() if "/staging/" in key]
    return [u.object_name for u in open_ones if u.object_name.startswith(store.prefix)] + staged


@pytest.mark.parametrize("size", [0, 5, 16 * MIB, 40 * MIB + 3])
def test_a_stream_becomes_a_blob(store: Store, size: int) -> None:
    data = os.urandom(size)

    def pieces() -> Iterator[memoryview]:
        buffer = bytearray(3 * MIB + 1)  # one buffer for all pieces, as a writer of tensors has
        for at in range(0, size, len(buffer)):
            part = data[at : at + len(buffer)]
            buffer[: len(part)] = part
            yield memoryview(buffer)[: len(part)]

    blob = store.put_stream("job-1", size, pieces())
    assert (blob.digest, blob.size) == ("sha256:" + hashlib.sha256(data).hexdigest(), size)
    assert b"".join(store.read_blob(blob.digest)) == data and leftovers(store) == []
    assert store.put_stream("job-2", size, iter([data])) == blob and leftovers(store) == []


@pytest.mark.parametrize("size", [100, 40 * MIB])
def test_a_stream_that_breaks_leaves_nothing(store: Store, size: int) -> None:
    def pieces() -> Iterator[bytes]:
        yield bytes(size - 1)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        store.put_stream("job-1", size, pieces())
    with pytest.raises(InvalidArgument) as caught:
        store.put_stream("job-1", size, iter([bytes(size - 1)]))
    assert caught.value.reason == "SIZE_MISMATCH" and leftovers(store) == []
    assert store.stat_blob("sha256:" + hashlib.sha256(bytes(size - 1)).hexdigest()) is None


KILLED = """
import os, sys, signal
from services.finetune.store import open_store
def pieces():
    yield bytes(40 << 20)
    os.kill(os.getpid(), signal.SIGKILL)
open_store(sys.argv[1]).put_stream(sys.argv[2], 80 << 20, pieces())
"""


def test_what_a_killed_process_left_is_dropped(store_uri: str, store: Store) -> None:
    for stream_id in ("job-1", "other-1"):
        ended = subprocess.run([sys.executable, "-c", KILLED, store_uri, stream_id], check=False, timeout=120)
        assert ended.returncode == -signal.SIGKILL
    assert len(leftovers(store)) == 2
    store.drop_streams("job-")
    assert len(leftovers(store)) == 1 and "other" in leftovers(store)[0]
    store.drop_streams("other-1")
    store.drop_streams("none")
    assert leftovers(store) == []


def test_ranges_are_read_into_place(store: Store) -> None:
    data = os.urandom(3 * MIB + 17)
    blob = store.put_blob(data)
    for offset, length in ((0, len(data)), (1000, 2 * MIB + 5), (len(data), 0)):
        buffer = bytearray(length)
        store.read_into(blob.digest, offset, memoryview(buffer))
        assert buffer == data[offset : offset + length]
    with pytest.raises(DataLoss) as caught:
        store.read_into(blob.digest, len(data) - 5, memoryview(bytearray(6)))
    assert caught.value.reason == "BLOB_CORRUPT"
    with pytest.raises(NotFound):
        store.read_into("sha256:" + "0" * 64, 0, memoryview(bytearray(6)))


def test_a_full_disk_ends_a_stream_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from services.finetune.errors import ResourceExhausted

    store = open_store(tmp_path.as_uri())

    def full(fd: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("services.finetune.store.file_stream.os.write", full)
    with pytest.raises(ResourceExhausted):
        store.put_stream("job-1", 3, iter([b"abc"]))
    assert leftovers(store) == []
