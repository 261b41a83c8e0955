"""The cache of blobs: what is there is not fetched again, and nothing that goes wrong with it is a caller's trouble."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.finetune.errors import DataLoss, InvalidArgument, NotFound, Unavailable
from services.finetune.store import Store, cache, open_store
from services.finetune.store.cache import Cache

KIB = 1 << 10


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Origin:
    """A store's side: it counts how often each blob is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.blobs: dict[str, bytes] = {}

    def put(self, data: bytes) -> str:
        self.blobs[digest_of(data)] = data
        return digest_of(data)

    def fetch(self, kept: Cache, digest: str, path: Path) -> bool:
        return kept.fetch(digest, path, lambda: self._source(digest))

    def _source(self, digest: str) -> tuple[int, Iterator[bytes]]:
        self.asked.append(digest)
        return len(self.blobs[digest]), iter([self.blobs[digest]])


@pytest.fixture()
def origin() -> Origin:
    return Origin()


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def blobs(folder: Path) -> set[str]:
    return {"sha256:" + p.name for p in folder.glob("sha256/??/*")}


def test_what_one_store_fetched_the_next_has(
    s3_uri: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers one after the other, on a real server that loses the blob between them."""
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(folder))
    data = os.urandom(3 << 20)
    digest = open_store(s3_uri).put_blob(data).digest
    open_store(s3_uri).fetch_blob(digest, tmp_path / "one" / "file")
    second = open_store(s3_uri)
    second.drop_blobs([digest], second.clock_s() + 60)
    second.fetch_blob(digest, tmp_path / "two" / "file")
    for place in ("one", "two"):
        assert (tmp_path / place / "file").read_bytes() == data
        assert os.listdir(tmp_path / place) == ["file"]
    with pytest.raises(NotFound) as caught:
        second.fetch_blob(digest_of(b"never stored"), tmp_path / "three")
    assert caught.value.reason == "BLOB_NOT_FOUND" and blobs(folder) == {digest}


def test_without_a_folder_there_is_none(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cache.from_environment({}) is None
    # A store of files needs none: it gives links.
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "cache"))
    made = open_store((tmp_path / "store").as_uri())
    made.fetch_blob(made.put_blob(b"x").digest, tmp_path / "x")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["", "0", "-1", "much", "nan", "inf"])
def test_a_size_that_is_none_is_refused(text: str, folder: Path) -> None:
    with pytest.raises(InvalidArgument, match="QUARTET_CACHE_GIB") as caught:
        Cache.from_environment({"QUARTET_CACHE_DIR": str(folder), "QUARTET_CACHE_GIB": text})
    assert caught.value.reason == "SETTING_INVALID"


@pytest.mark.parametrize("linked", [True, False])
def test_a_copy_is_read_only_and_the_callers_own(
    origin: Origin, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    def elsewhere(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    if not linked:
        monkeypatch.setattr(os, "link", elsewhere)
    kept, digest, path = Cache(folder, 1 << 20), origin.put(b"weights"), tmp_path / "w"
    assert origin.fetch(kept, digest, path) and path.read_bytes() == b"weights"
    assert path.stat().st_mode & 0o777 == 0o444
    assert (path.stat().st_nlink == 2) == linked
    path.unlink()
    assert blobs(folder) == {digest}


def test_a_damaged_entry_is_fetched_again(origin: Origin, folder: Path, tmp_path: Path) -> None:
    kept, digest = Cache(folder, 1 << 20), origin.put(b"weights")
    assert origin.fetch(kept, digest, tmp_path / "a")
    [entry] = folder.glob("sha256/??/*")
    entry.unlink()
    entry.write_bytes(b"weighty")
    assert origin.fetch(kept, digest, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights" and origin.asked == [digest] * 2


def test_what_the_store_has_damaged_is_said_and_not_kept(origin: Origin, folder: Path, tmp_path: Path) -> None:
    kept, digest = Cache(folder, 1 << 20), origin.put(b"weights")
    origin.blobs[digest] = b"weight"
    with pytest.raises(DataLoss) as caught:
        origin.fetch(kept, digest, tmp_path / "a")
    assert caught.value.reason == "BLOB_CORRUPT"
    assert blobs(folder) == set() and not (tmp_path / "a").exists()


def test_the_store_going_away_is_told_as_ever(folder: Path, tmp_path: Path) -> None:
    def source() -> tuple[int, Iterator[bytes]]:
        raise Unavailable("the store does not answer", reason="STORE_UNREACHABLE")

    with pytest.raises(Unavailable):
        Cache(folder, 1 << 20).fetch(digest_of(b"x"), tmp_path / "a", source)
    assert blobs(folder) == set()


def test_the_least_lately_used_goes_first(origin: Origin, folder: Path, tmp_path: Path) -> None:
    kept = Cache(folder, 100 * KIB)
    digests = [origin.put(bytes([n]) * (20 * KIB)) for n in range(6)]
    for age, digest in enumerate(digests[:4]):
        assert origin.fetch(kept, digest, tmp_path / "out")
        entry = folder / "sha256" / digest[7:9] / digest[7:]
        os.utime(entry, (1e9 + age, 1e9 + age))
    assert origin.fetch(kept, digests[0], tmp_path / "out")  # used again, so it is the youngest
    for digest in digests[4:]:
        assert origin.fetch(kept, digest, tmp_path / "out")
        assert sum(p.stat().st_size for p in folder.glob("sha256/??/*")) <= 100 * KIB
    assert {digests[0], *digests[4:]} <= blobs(folder) and digests[1] not in blobs(folder)


def test_many_small_blobs_are_not_counted_each_time(
    origin: Origin, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, entries = [], cache._entries

    def counting(place: Path) -> Iterator[tuple[float, int, Path]]:
        counted.append(place)
        return entries(place)

    monkeypatch.setattr(cache, "_entries", counting)
    kept = Cache(folder, 1 << 20)
    for n in range(200):
        assert origin.fetch(kept, origin.put(b"%d" % n), tmp_path / "out")
    assert len(counted) == 1 and len(blobs(folder)) == 200


def test_a_blob_that_would_push_out_all_others_is_the_callers_to_fetch(
    origin: Origin, folder: Path, tmp_path: Path
) -> None:
    kept, small = Cache(folder, 100 * KIB), origin.put(b"small")
    assert origin.fetch(kept, small, tmp_path / "out")
    assert not origin.fetch(kept, origin.put(bytes(60 * KIB)), tmp_path / "big")
    assert blobs(folder) == {small} and not (tmp_path / "big").exists()


def test_two_at_once_fetch_once(folder: Path, tmp_path: Path) -> None:
    data, begun, go, asked = b"weights", threading.Event(), threading.Event(), []

    def pieces() -> Iterator[bytes]:
        begun.set()
        assert go.wait(60)
        yield data

    def source() -> tuple[int, Iterator[bytes]]:
        asked.append(1)
        return len(data), pieces()

    def fetch(n: int) -> None:
        assert Cache(folder, 1 << 20).fetch(digest_of(data), tmp_path / str(n), source)

    threads = [threading.Thread(target=fetch, args=(n,)) for n in range(3)]
    threads[0].start()
    assert begun.wait(60)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert [(tmp_path / str(n)).read_bytes() for n in range(3)] == [data] * 3 and asked == [1]
    assert blobs(folder) == {digest_of(data)}


HOLDER = """
import sys, time
from pathlib import Path
from services.finetune.store.cache import Cache

def pieces():
    yield b"wei"
    print("writing", flush=True)
    time.sleep(600)

Cache(Path(sys.argv[1]), 1 << 20).fetch(sys.argv[2], Path(sys.argv[1]) / "out", lambda: (7, pieces()))
"""


@pytest.fixture()
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to fetch b"weights", and does not get on."""
    command = [sys.executable, "-c", HOLDER, str(folder), digest_of(b"weights")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_one_that_was_killed_is_in_nobodys_way(
    holder: subprocess.Popen[str], origin: Origin, folder: Path, tmp_path: Path
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert len(blobs(folder)) == 1  # its part
    digest = origin.put(b"weights")
    assert origin.fetch(Cache(folder, 1 << 20), digest, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"weights" and blobs(folder) == {digest}


def test_one_that_stands_still_is_not_waited_for(
    holder: subprocess.Popen[str], origin: Origin, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "STALLED_S", 0.3)
    assert not origin.fetch(Cache(folder, 1 << 20), origin.put(b"weights"), tmp_path / "a")
    assert origin.asked == []


def test_what_is_on_its_way_is_not_pushed_out_and_what_was_left_is(
    holder: subprocess.Popen[str], origin: Origin, folder: Path, tmp_path: Path
) -> None:
    def fill() -> None:
        for data in (os.urandom(400 * KIB), os.urandom(400 * KIB), os.urandom(400 * KIB)):
            assert origin.fetch(Cache(folder, 1 << 20), origin.put(data), tmp_path / "a")

    [part] = folder.glob("sha256/??/*.part")
    os.utime(part, (1e9, 1e9))
    fill()
    assert part.exists()
    holder.kill()
    holder.wait()
    fill()
    assert not part.exists()


def test_a_folder_that_cannot_be_written_to_costs_time_only(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("QUARTET_CACHE_DIR", str(tmp_path / "file"))
    made = open_store(s3_uri)
    made.fetch_blob(made.put_blob(b"x").digest, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"x" and "does not serve" in caplog.text
