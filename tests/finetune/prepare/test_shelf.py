"""Equal data is computed once, whoever asks, however often and whoever dies."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from services.finetune.errors import Cancelled, InvalidArgument
from services.finetune.orders import ArtifactRef, PrepareRun
from services.finetune.prepare import shelf
from services.finetune.prepare.shelf import find, obtain, shelf_key
from services.finetune.store import Store
from services.finetune.store.artifacts import Manifest, publish


def artifact(store: Store, text: str = "") -> str:
    return publish(store, Manifest("prepared", (), meta={"text": text}))


def test_many_that_ask_at_once_get_one(store: Store) -> None:
    made: list[str] = []

    def ask(owner: str) -> str:
        def make() -> str:
            time.sleep(0.5)
            made.append(owner)
            return artifact(store)

        return obtain(store, "k", owner, make, threading.Event())

    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(ask, [f"jobs/{n}" for n in range(8)]))
    assert len(found) == len(made) == 1 and find(store, "k") == found.pop()


def test_a_failure_leaves_the_place_free(file_store: Store) -> None:
    def fail() -> str:
        raise InvalidArgument("no", reason="DATASET_EMPTY")

    with pytest.raises(InvalidArgument):
        obtain(file_store, "k", "jobs/a", fail, threading.Event())
    assert file_store.get("prepared/k.json") is None
    began = time.monotonic()
    obtain(file_store, "k", "jobs/b", lambda: artifact(file_store), threading.Event())
    assert time.monotonic() - began < 2


def test_the_dead_hold_nobody_up_for_long(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "STALE_S", 0.5)
    file_store.put("prepared/k.json", json.dumps({"digest": None, "owner": "jobs/dead", "beat": 3}).encode())
    waited: list[int] = []
    digest = obtain(
        file_store, "k", "jobs/b", lambda: artifact(file_store), threading.Event(), lambda: waited.append(1)
    )
    assert waited == [1] and find(file_store, "k") == digest


def test_the_next_attempt_of_a_job_takes_over_at_once(file_store: Store) -> None:
    file_store.put("prepared/k.json", json.dumps({"digest": None, "owner": "jobs/a", "beat": 3}).encode())
    began = time.monotonic()
    obtain(file_store, "k", "jobs/a", lambda: artifact(file_store), threading.Event())
    assert time.monotonic() - began < 2


def test_the_living_keep_their_claim(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "STALE_S", 0.6)
    monkeypatch.setattr(shelf, "BEAT_S", 0.1)
    made: list[str] = []

    def slow() -> str:
        time.sleep(1.5)
        made.append("slow")
        return artifact(file_store)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(obtain, file_store, "k", "jobs/a", slow, threading.Event())
        time.sleep(0.2)
        second = pool.submit(obtain, file_store, "k", "jobs/b", slow, threading.Event())
    assert first.result() == second.result() and made == ["slow"]


def test_waiting_can_be_stopped(file_store: Store) -> None:
    file_store.put("prepared/k.json", json.dumps({"digest": None, "owner": "jobs/a", "beat": 0}).encode())
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        obtain(file_store, "k", "jobs/b", lambda: artifact(file_store), stop)


def test_an_artifact_that_is_gone_is_made_again(file_store: Store) -> None:
    digest = obtain(file_store, "k", "jobs/a", lambda: artifact(file_store), threading.Event())
    file_store.delete(f"manifests/{digest.removeprefix('sha256:')}.json")
    assert find(file_store, "k") is None
    assert obtain(file_store, "k", "jobs/a", lambda: artifact(file_store), threading.Event()) == digest


def test_a_key_holds_all_that_decides_the_blocks(order: PrepareRun) -> None:
    data, other = order.data, ArtifactRef(name="n", digest="sha256:" + "1" * 64)
    changed = [
        replace(order, datasets=(*order.datasets, other)),
        replace(order, seed=1),
        replace(order, data=replace(data, system="Be kind.")),
        replace(order, data=replace(data, max_length=64)),
        replace(order, data=replace(data, pack=False)),
        replace(order, data=replace(data, max_rows=5)),
        replace(order, data=replace(data, weights=(2.0,))),
    ]
    keys = [shelf_key(run, {"digest": "a"}) for run in (order, *changed)] + [shelf_key(order, {"digest": "b"})]
    assert len(set(keys)) == len(keys)
    same = replace(order, job="another", data=replace(data, weights=(1.0,)))
    assert shelf_key(same, {"digest": "a"}) == keys[0]
