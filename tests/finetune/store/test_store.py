"""One suite that both store adapters pass."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from services.finetune.errors import (
    Aborted,
    DataLoss,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from services.finetune.store import Store, open_store

MIB = 1 << 20


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


# ---------------------------------------------------------------------------------------------- blobs


def test_blob_comes_back_whole_and_in_ranges(store: Store, tmp_path: Path) -> None:
    data = os.urandom(3 * MIB + 17)
    path = tmp_path / "big"
    path.write_bytes(data)
    blob = store.put_file(path)
    assert (blob.digest, blob.size) == (digest_of(data), len(data))
    assert store.stat_blob(blob.digest) == blob == store.put_file(path) == store.put_blob(data)
    pieces = list(store.read_blob(blob.digest))
    assert b"".join(pieces) == data and max(map(len, pieces)) <= MIB
    for offset, length in ((1000, 2 * MIB), (0, 0), (len(data) - 1, None), (len(data) - 1, 50), (len(data), None)):
        wanted = data[offset:] if length is None else data[offset : offset + length]
        assert b"".join(store.read_blob(blob.digest, offset, length)) == wanted


def test_file_of_several_parts(store: Store, tmp_path: Path) -> None:
    data = os.urandom(MIB) * 37
    (tmp_path / "big").write_bytes(data)
    blob = store.put_file(tmp_path / "big")
    assert blob.digest == digest_of(data)
    assert hashlib.sha256(b"".join(store.read_blob(blob.digest))).hexdigest() == blob.digest[7:]


def test_empty_blob(store: Store, tmp_path: Path) -> None:
    blob = store.put_blob(b"")
    assert store.stat_blob(blob.digest) == blob and list(store.read_blob(blob.digest)) == []
    store.fetch_blob(blob.digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def test_fetch_makes_a_read_only_copy_and_folders(store: Store, tmp_path: Path) -> None:
    one, two = store.put_blob(b"one"), store.put_blob(b"two")
    path = tmp_path / "a" / "b" / "copy"
    for blob, data in ((one, b"one"), (one, b"one"), (two, b"two")):
        store.fetch_blob(blob.digest, path)
        assert path.read_bytes() == data and path.stat().st_mode & 0o222 == 0
    assert b"".join(store.read_blob(one.digest)) == b"one"
    assert os.listdir(path.parent) == ["copy"]


def test_many_may_fetch_to_one_path(store: Store, tmp_path: Path) -> None:
    blob = store.put_blob(b"shared")
    errors: list[BaseException] = []

    def fetch() -> None:
        try:
            for _ in range(10):
                store.fetch_blob(blob.digest, tmp_path / "copy")
        except BaseException as error:
            errors.append(error)

    run_all([threading.Thread(target=fetch) for _ in range(4)])
    assert not errors and (tmp_path / "copy").read_bytes() == b"shared"


def test_missing_blob(store: Store, tmp_path: Path) -> None:
    absent = digest_of(b"nobody wrote this")
    assert store.stat_blob(absent) is None
    with pytest.raises(NotFound, match="not in the store"):
        store.read_blob(absent)
    with pytest.raises(NotFound):
        store.fetch_blob(absent, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    for malformed in ("sha256:../../etc/passwd", "md5:" + "0" * 64, "sha256:" + "A" * 64, ""):
        with pytest.raises(InvalidArgument) as error:
            store.stat_blob(malformed)
        assert error.value.reason == "DIGEST_MALFORMED"


def test_file_store_links_and_hashes_once(file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = file_store.put_blob(b"x" * MIB)
    file_store.fetch_blob(blob.digest, tmp_path / "first")
    monkeypatch.setattr("services.finetune.store.file.hash_file", None)  # a second hashing would fail
    file_store.fetch_blob(blob.digest, tmp_path / "second")
    assert (tmp_path / "first").samefile(tmp_path / "second")


def test_file_store_notices_damage(file_store: Store, tmp_path: Path) -> None:
    blob = file_store.put_blob(b"precious")
    file_store.fetch_blob(blob.digest, tmp_path / "copy")
    path = next((tmp_path / "store" / "blobs").rglob(blob.digest[7:]))
    path.chmod(0o644)
    path.write_bytes(b"precxous")
    with pytest.raises(DataLoss) as error:
        file_store.fetch_blob(blob.digest, tmp_path / "other")
    assert error.value.reason == "BLOB_CORRUPT" and not (tmp_path / "other").exists()


def put_url(url: str, data: bytes) -> int:
    request = urllib.request.Request(url, data=data, method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def get_url(url: str, wanted: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": wanted}), timeout=60) as answer:
            return int(answer.status), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, b""


def test_links_to_a_blob_are_for_it_alone_and_end(s3_store: Store) -> None:
    blob, other = s3_store.put_blob(b"0123456789"), s3_store.put_blob(b"secret")
    url, soon = s3_store.link_blob(blob.digest, 600), s3_store.link_blob(blob.digest, 1)
    assert get_url(url, "bytes=2-4") == (206, b"234")
    (mine, theirs) = (d.removeprefix("sha256:") for d in (blob.digest, other.digest))
    assert get_url(url.replace(mine, theirs).replace(f"/{mine[:2]}/", f"/{theirs[:2]}/"), "bytes=0-1")[0] == 403
    assert put_url(url, b"x") == 403
    time.sleep(2.5)
    assert get_url(soon, "bytes=2-4")[0] == 403


def test_a_file_store_has_no_links(file_store: Store) -> None:
    assert file_store.link_blob(file_store.put_blob(b"x").digest, 60) == ""
    assert not file_store.begin_upload("u", digest_of(b"x"), 100 * MIB).links(10, 60)


def test_ranges_come_by_links_in_any_order(s3_store: Store) -> None:
    data = os.urandom(20 * MIB)
    links = s3_store.begin_upload("u", digest_of(data), len(data)).links(10, 60)
    assert [(k.offset // MIB, k.size // MIB) for k in links] == [(0, 8), (8, 8), (16, 4)]

    def put(number: int, size: int | None = None) -> int:
        link = links[number]
        assert put_url(link.url, data[link.offset : link.offset + (size or link.size)]) == 200
        found = s3_store.find_upload("u")
        assert found is not None
        return found.committed // MIB

    assert put(2) == 0
    assert put(0, 6 * MIB) == 0  # of another length it does not count, and can be sent again
    assert put(0) == 8
    assert put(1) == 20
    upload = s3_store.find_upload("u")
    assert upload is not None and not upload.links(10, 60)
    assert upload.finish().digest == digest_of(data)
    assert b"".join(s3_store.read_blob(digest_of(data))) == data


def test_links_are_for_one_range_of_one_upload_and_end(s3_store: Store) -> None:
    data = os.urandom(9 * MIB)
    upload = s3_store.begin_upload("u", digest_of(data), len(data))
    first, second = upload.links(10, 60)
    assert put_url(second.url.replace("partNumber=2", "partNumber=1"), data) == 403
    assert put_url(first.url.replace("/staging/u", "/staging/v"), data) in (403, 404)
    (soon,) = upload.links(1, 1)
    time.sleep(2.5)
    assert put_url(soon.url, data[: 8 * MIB]) == 403
    # What arrives is what was announced, or nothing is kept.
    for link in (first, second):
        assert put_url(link.url, bytes(link.size)) == 200
    found = s3_store.find_upload("u")
    assert found is not None
    with pytest.raises(InvalidArgument) as error:
        found.finish()
    assert error.value.reason == "DIGEST_MISMATCH" and s3_store.stat_blob(digest_of(data)) is None
    assert s3_store.find_upload("u") is None


# ---------------------------------------------------------------------------------------------- small objects


def test_objects_and_their_conditions(store: Store) -> None:
    assert store.get("a/b.json") is None
    first = store.put("a/b.json", b"1", if_absent=True)
    second = store.put("a/b.json", b"2", if_match=first)
    refused = (
        lambda: store.put("a/b.json", b"3", if_absent=True),
        lambda: store.put("a/b.json", b"3", if_match=first),
        lambda: store.put("a/absent.json", b"3", if_match=first),
        lambda: store.delete("a/b.json", if_match=first),
        lambda: store.delete("a/absent.json", if_match=first),
    )
    for attempt in refused:
        with pytest.raises(Aborted) as error:
            attempt()
        assert error.value.reason == "PRECONDITION_FAILED"
    found = store.get("a/b.json")
    assert found is not None and (found.key, found.data, found.etag) == ("a/b.json", b"2", second)
    third = store.put("a/b.json", b"3")
    store.delete("a/b.json", if_match=third)
    store.delete("a/b.json")
    assert store.get("a/b.json") is None and store.get("a/absent.json") is None


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\nb", "x" * 300])
def test_malformed_keys(store: Store, key: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        store.put(key, b"1")
    assert error.value.reason == "KEY_MALFORMED"
    with pytest.raises(InvalidArgument):
        store.get(key)


@pytest.mark.parametrize("condition", ["absent", "match"])
def test_of_eight_writers_one_wins(store: Store, condition: str) -> None:
    etag = store.put("race", b"start") if condition == "match" else None
    won: list[int] = []
    lost: list[int] = []
    gate = threading.Barrier(8)

    def write(n: int) -> None:
        gate.wait()
        try:
            store.put("race", str(n).encode(), if_match=etag, if_absent=etag is None)
            won.append(n)
        except Aborted:
            lost.append(n)

    run_all([threading.Thread(target=write, args=(n,)) for n in range(8)])
    found = store.get("race")
    assert len(won) == 1 and len(lost) == 7
    assert found is not None and found.data == str(won[0]).encode()


def test_listing_is_bytewise_and_in_pages(store: Store) -> None:
    keys = ["w/d.json", "w/d/r/1.json", "w/d/r/2.json", "w/d-2.json", "w/d-2/r/1.json", "w/Z", "w/é", "w/~", "wx"]
    for key in keys:
        store.put(key, b"1")
    below = sorted((k for k in keys if k.startswith("w/")), key=str.encode)
    assert [e.key for e in store.list("w/")] == below
    for limit in (1, 2, 3):
        paged: list[str] = []
        while page := store.list("w/", start_after=paged[-1] if paged else "", limit=limit):
            assert len(page) <= limit
            paged += [e.key for e in page]
        assert paged == below
    assert [e.key for e in store.list("w/d")] == [k for k in below if k.startswith("w/d")]
    assert len(store.list("")) == len(keys) and store.list("nothing/") == []
    assert [e.key for e in store.list("w/", start_after="w/d.j")] == [k for k in below if k > "w/d.j"]
    found = store.get("w/Z")
    assert found is not None and store.list("w/Z")[0].etag == found.etag


# ---------------------------------------------------------------------------------------------- uploads


def send(store: Store, upload_id: str, data: bytes, digest: str, size: int) -> None:
    upload = store.begin_upload(upload_id, digest, size)
    upload.write(0, data)
    upload.finish()


def test_upload_goes_on_after_a_restart(store_uri: str) -> None:
    data = os.urandom(MIB) * 20
    upload = open_store(store_uri).begin_upload("up", digest_of(data), len(data))
    for at in range(0, 17 * MIB, MIB):
        upload.write(at, data[at : at + MIB])
    upload.flush()
    assert open_store(store_uri).stat_blob(upload.digest) is None
    again = open_store(store_uri).find_upload("up")
    assert again is not None and 16 * MIB <= again.committed <= 17 * MIB
    with pytest.raises(OutOfRange) as wrong:
        again.write(again.committed + 1, b"x")
    assert wrong.value.reason == "OFFSET_WRONG"
    assert wrong.value.metadata["offset_bytes"] == str(again.committed)
    for at in range(again.committed, len(data), MIB):
        again.write(at, data[at : at + MIB])
    blob = again.finish()
    store = open_store(store_uri)
    assert store.stat_blob(blob.digest) == blob
    assert b"".join(store.read_blob(blob.digest)) == data
    assert store.find_upload("up") is None


def test_resumed_upload_of_wrong_bytes_is_refused(store_uri: str) -> None:
    data = os.urandom(MIB) * 10
    upload = open_store(store_uri).begin_upload("up", digest_of(data), len(data))
    for at in range(0, 9 * MIB, MIB):
        upload.write(at, bytes(MIB))
    upload.flush()
    again = open_store(store_uri).begin_upload("up", digest_of(data), len(data))
    assert again.committed >= 8 * MIB
    again.write(again.committed, data[again.committed :])
    with pytest.raises(InvalidArgument) as error:
        again.finish()
    assert error.value.reason == "DIGEST_MISMATCH"
    store = open_store(store_uri)
    assert store.stat_blob(digest_of(data)) is None and store.find_upload("up") is None


def test_wrong_bytes_are_refused_and_nothing_is_kept(store: Store) -> None:
    for upload_id, data, reason in (("lie", b"false", "DIGEST_MISMATCH"), ("short", b"tru", "SIZE_MISMATCH")):
        with pytest.raises(InvalidArgument) as error:
            send(store, upload_id, data, digest_of(b"truth"), 5)
        assert error.value.reason == reason
        assert store.find_upload(upload_id) is None
    assert store.stat_blob(digest_of(b"truth")) is None
    send(store, "lie", b"truth", digest_of(b"truth"), 5)
    assert store.stat_blob(digest_of(b"truth")) is not None


def test_same_bytes_twice(store: Store) -> None:
    for upload_id in ("one", "two", "one"):
        send(store, upload_id, b"same", digest_of(b"same"), 4)
    assert b"".join(store.read_blob(digest_of(b"same"))) == b"same"
    send(store, "nothing", b"", digest_of(b""), 0)
    assert store.stat_blob(digest_of(b"")) is not None


def test_an_upload_id_stands_for_one_blob(store: Store) -> None:
    first = store.begin_upload("id", digest_of(b"a"), 1)
    for digest, size, reason in ((digest_of(b"b"), 1, "DIGEST_MISMATCH"), (digest_of(b"a"), 2, "SIZE_MISMATCH")):
        with pytest.raises(InvalidArgument) as error:
            store.begin_upload("id", digest, size)
        assert error.value.reason == reason
    first.write(0, b"a")
    assert first.finish().size == 1
    assert store.find_upload("never") is None
    with pytest.raises(InvalidArgument):
        store.begin_upload("../up", digest_of(b"a"), 1)


# ---------------------------------------------------------------------------------------------- when it fails


def test_answer_lost_on_the_way(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put that is sent twice, because its first answer was lost, wins once; another's does not."""
    from services.finetune.store.s3 import S3Store

    store = S3Store(s3_uri)
    put_once = store.quick._put_object

    def put_twice(*args: Any) -> object:
        put_once(*args)
        return put_once(*args)

    monkeypatch.setattr(store.quick, "_put_object", put_twice)
    etag = store.put("claim", b"me", if_absent=True)
    found = store.get("claim")
    assert found is not None and found.etag == etag
    assert store.put("claim", b"me again", if_match=etag) != etag
    with pytest.raises(Aborted):
        store.put("claim", b"me again", if_absent=True)


def test_finish_goes_on_after_a_restart(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are put together, then the service dies before the copy."""
    from services.finetune.store.s3 import S3Store

    data = os.urandom(MIB) * 9
    store = S3Store(s3_uri)
    upload = store.begin_upload("up", digest_of(data), len(data))
    upload.write(0, data)
    monkeypatch.setattr(store.patient, "copy_object", lost_connection)
    with pytest.raises(Unavailable):
        upload.finish()
    assert store.stat_blob(digest_of(data)) is None
    again = open_store(s3_uri).find_upload("up")
    assert again is not None and again.committed == len(data)
    assert again.finish() == store.stat_blob(digest_of(data))


def test_parts_that_the_bucket_dropped(s3_uri: str) -> None:
    """Many buckets expire unfinished uploads: such an upload is gone, and can be begun anew."""
    from services.finetune.store.s3 import S3Store

    store = S3Store(s3_uri)
    store.begin_upload("up", digest_of(b"a"), 1)
    staging = f"{store.prefix}staging/up"
    multipart = store.quick._list_multipart_uploads(store.bucket, prefix=staging).uploads[0].upload_id
    assert multipart is not None
    store.quick._abort_multipart_upload(store.bucket, staging, multipart)
    assert store.find_upload("up") is None
    send(store, "up", b"a", digest_of(b"a"), 1)


def lost_connection(*_: object, **__: object) -> None:
    raise ConnectionResetError("cut")


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
