"""What is garbage, on both stores; and that nothing else is ever dropped, whatever happens beside the collector."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from services.finetune.errors import DataLoss, FailedPrecondition
from services.finetune.store import Store, file, garbage, open_store, s3_garbage
from services.finetune.store.artifacts import File, Manifest, Parent, delete_ref, publish, put_ref
from services.finetune.store.garbage import Counted, Report, collect
from services.finetune.store.holds import hold, release

EVERYTHING_IS_OLD = -3600.0
"""A grace that makes what was just written old: no server lets a test set a blob's date."""


def made(store: Store, kind: Any, text: str, *parents: Parent) -> str:
    """An artifact of one blob; its digest."""
    blob = store.put_blob(text.encode())
    return publish(store, Manifest(kind, (File("f", blob.digest, blob.size),), parents))


def texts(store: Store) -> set[str]:
    return {b"".join(store.read_blob(blob.digest)).decode() for blob in store.list_blobs()}


def done(store: Store, grace_s: float = EVERYTHING_IS_OLD, dry_run: bool = False) -> Report:
    *_, last = collect(store, grace_s, dry_run)
    assert last.phase == "DONE"
    return last


def library(store: Store) -> None:
    """One artifact for each way to be reached, and for each to be not."""
    base = made(store, "base", "base of an adapter whose own name is gone")
    checkpoint = made(store, "checkpoint", "checkpoint", Parent("base", base), Parent("dataset", "sha256:" + "0" * 64))
    adapter = made(store, "adapter", "adapter", Parent("base", base), Parent("checkpoint", checkpoint))
    put_ref(store, "workspaces/w/models/adapter", {"digest": adapter})
    merged = made(store, "merged", "merged", Parent("base", made(store, "base", "base of a merged model")))
    put_ref(store, "workspaces/w/models/merged", {"digest": merged})
    hold(store, "w.endpoints.e.1", "workspaces/w/endpoints/e", [made(store, "base", "served")])
    hold(store, "w.validations.v.1", "workspaces/w/validations/v", [store.put_blob(b"report").digest])
    hold(store, "w.trainingJobs.j.1", "workspaces/w/trainingJobs/j", ())
    saved = made(store, "checkpoint", "saved by a job that runs")
    store.put("jobs/w.trainingJobs.j.1/attempts/0001/checkpoints/00000010.json", json.dumps({"digest": saved}).encode())
    file = store.put_blob(b"file of a merge that was cut")
    store.put("jobs/w.trainingJobs.j.1/files/model.safetensors.json", json.dumps({"digest": file.digest}).encode())
    result = {"attempt": 1, "outcome": {"state": "SUCCEEDED", "result": {"model": made(store, "base", "result")}}}
    store.put("jobs/w.trainingJobs.j.1/lease.json", json.dumps(result).encode())
    store.put("jobs/w.trainingJobs.k.1/lease.json", json.dumps({"digest": made(store, "base", "of the past")}).encode())
    revision = made(store, "dataset", "revision")
    put_ref(store, "workspaces/w/datasets/d/revisions/r", {"digest": revision})
    for n, data in enumerate((revision, made(store, "dataset", "revision that is no more"))):
        digest = made(store, "prepared", f"blocks {n}", Parent("dataset", data))
        store.put(f"prepared/{n}.json", json.dumps({"digest": digest}).encode())
    store.put("prepared/claimed.json", json.dumps({"digest": None, "owner": "jobs/j", "beat": 1}).encode())


LIVE = {
    "base of an adapter whose own name is gone", "adapter", "merged", "served", "report", "saved by a job that runs",
    "file of a merge that was cut", "result", "revision", "blocks 0",
}  # fmt: skip
DEAD = {"checkpoint", "base of a merged model", "of the past", "revision that is no more", "blocks 1"}


def test_what_is_reached_stays_and_the_rest_goes(store: Store) -> None:
    library(store)
    assert texts(store) == LIVE | DEAD
    young = done(store, grace_s=3600)
    assert (young.live.count, young.young.count, young.garbage, young.prepared) == (11, 4, Counted(), Counted())
    looked = done(store, dry_run=True)
    assert texts(store) == LIVE | DEAD and store.get("prepared/1.json") is not None
    dropped = done(store)
    assert dropped == looked and texts(store) == LIVE
    assert dropped.live == Counted(10, sum(map(len, LIVE))) and dropped.garbage == Counted(5, sum(map(len, DEAD)))
    assert dropped.prepared.count == 1 and store.get("prepared/1.json") is None
    assert {e.key for e in store.list("prepared/")} == {"prepared/0.json", "prepared/claimed.json"}
    again = done(store)
    assert again.garbage == Counted() and texts(store) == LIVE
    for key in ("garbage/collector.json", "garbage/sweep.json"):
        assert store.get(key) is None


def test_what_loses_its_last_name_goes(store: Store) -> None:
    library(store)
    delete_ref(store, "workspaces/w/models/adapter")
    release(store, "w.endpoints.e.1")
    done(store)
    assert texts(store) == LIVE - {"adapter", "base of an adapter whose own name is gone", "served"}


def test_a_damaged_manifest_stops_it(file_store: Store, tmp_path: Path) -> None:
    """What it needs cannot be told, so nothing may be dropped."""
    library(file_store)
    (adapter,) = (p for p in (tmp_path / "store/objects/manifests").iterdir() if b'"adapter"' in p.read_bytes()[:400])
    adapter.write_bytes(adapter.read_bytes() + b" ")
    with pytest.raises(DataLoss):
        done(file_store)
    assert texts(file_store) == LIVE | DEAD


def test_cut_uploads_and_temporary_files_go(store: Store, tmp_path: Path) -> None:
    data = os.urandom(9 << 20)
    digest = "sha256:" + "1" * 64
    upload = store.begin_upload("cut", digest, len(data))
    upload.write(0, data[: 8 << 20])
    upload.flush()
    if (tmp_path / "store").exists():
        (tmp_path / "store/tmp/left").write_bytes(b"by kill -9")
    assert done(store, grace_s=3600).uploads == Counted() and store.find_upload("cut") is not None
    looked = done(store, dry_run=True)
    assert looked.uploads.size >= 8 << 20 and store.find_upload("cut") is not None
    assert done(store) == looked and looked.temporary.count == (tmp_path / "store").exists()
    assert store.find_upload("cut") is None and not list(store.leftovers(time.time() + 3600, drop=False))
    store.put_blob(b"the store works on")


def test_a_blob_that_is_touched_stays(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (file, s3_garbage):
        monkeypatch.setattr(module, "TOUCH_AFTER_S", 0.0)
    (tmp_path / "x").write_bytes(b"by file")
    ways = {
        "touched": store.touch_blob,
        "put again": lambda digest: store.put_blob(b"put again"),
        "by file": lambda digest: store.put_file(tmp_path / "x"),
        "uploaded": lambda digest: uploaded(store, b"uploaded"),
        "named": lambda digest: publish(store, Manifest("base", (File("f", digest, 5),))),
    }
    blobs = {text: store.put_blob(text.encode()).digest for text in (*ways, "forgotten")}
    time.sleep(2.1)  # S3 dates by the second, and a disk by the last tick
    before_s = store.clock_s() - 0.5
    for text, way in ways.items():
        assert way(blobs[text]) is not None
    assert store.drop_blobs(list(blobs.values()), before_s) == 1
    assert texts(store) == set(ways)
    assert store.touch_blob(blobs["forgotten"]) is None


def uploaded(store: Store, data: bytes) -> object:
    upload = store.begin_upload("u", store.put_blob(data).digest, len(data))
    upload.write(0, data)
    return upload.finish()


def test_a_writer_waits_for_a_deletion_that_is_under_way(s3_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its touch comes between a collector's look at the date and the deletion: the moment that S3 cannot make atomic."""
    monkeypatch.setattr(s3_garbage, "TOUCH_AFTER_S", 0.0)
    blob = s3_store.put_blob(b"wanted again")
    time.sleep(1.1)
    s3_store.put(s3_garbage.SWEEP, json.dumps({"digests": [blob.digest]}).encode())
    writer = threading.Thread(target=lambda: s3_store.put_blob(b"wanted again"))
    writer.start()
    time.sleep(0.7)
    assert writer.is_alive()
    s3_store.drop(s3_store.blob_key(blob.digest))
    s3_store.delete(s3_garbage.SWEEP)
    writer.join(20)
    assert b"".join(s3_store.read_blob(blob.digest)) == b"wanted again"


def test_a_writer_does_not_wait_for_the_dead(s3_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TOUCH_AFTER_S": 0.0, "PATIENCE_S": 0.5}.items():
        monkeypatch.setattr(s3_garbage, name, value)
    blob = s3_store.put_blob(b"x")
    time.sleep(1.1)
    s3_store.put(s3_garbage.SWEEP, json.dumps({"digests": [blob.digest]}).encode())
    assert s3_store.put_blob(b"x") == blob == s3_store.stat_blob(blob.digest)
    assert s3_store.get(s3_garbage.SWEEP) is None


def test_one_at_a_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    library(store)
    first = collect(store, EVERYTHING_IS_OLD, False)
    next(first)
    with pytest.raises(FailedPrecondition) as busy:
        done(store)
    assert busy.value.reason == "COLLECTOR_BUSY" and done(store, dry_run=True).garbage.count == len(DEAD)
    monkeypatch.setattr(garbage, "STALE_S", -1.0)  # as if it had not been heard of for long
    assert done(store).garbage.count == len(DEAD)
    with pytest.raises(FailedPrecondition):  # it lives after all, and finds that another took over
        list(first)
    assert texts(store) == LIVE


def test_it_may_be_cut_after_any_step(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "BATCH", 1)
    library(file_store)
    for steps in range(1, 20):
        cut = collect(file_store, EVERYTHING_IS_OLD, False)
        for _ in range(steps):
            next(cut, None)
        cut.close()  # type: ignore[attr-defined]
        assert texts(file_store) >= LIVE
    done(file_store)
    assert texts(file_store) == LIVE


def test_kill_9_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store((tmp_path / "store").as_uri())
    library(store)
    for n in range(3000):
        store.root.joinpath("blobs", "sha256", "ab").mkdir(exist_ok=True)  # type: ignore[attr-defined]
        (tmp_path / f"store/blobs/sha256/ab/ab{n:062x}").write_bytes(b"g")
    code = f"from tests.finetune.store.test_garbage import *; done(open_store({store.uri!r}))"
    run = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path / "store/blobs/sha256/ab")) > 2500 and time.monotonic() < deadline:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert {text for text in texts(store) if text != "g"} >= LIVE
    monkeypatch.setattr(garbage, "STALE_S", -1.0)
    done(store)
    assert texts(store) == LIVE
