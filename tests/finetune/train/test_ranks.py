"""The whole worker with eight ranks, then four, then one: what befalls a rank costs an attempt, and no step differs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.finetune.config import override, to_json
from services.finetune.progress import (
    attempt_key,
    dump,
    newest_checkpoint,
    raise_fence,
    read_fault,
    read_outcome,
    read_segments,
    run_uri,
)
from services.finetune.store import Store
from tests.finetune.train.test_parallel import order

STEPS = 50
KEY = "jobs/j"


def start(store: Store, tmp_path: Path, attempt: int, processes: int, key: str = KEY) -> subprocess.Popen[bytes]:
    run = order(store, tmp_path / f"base-{processes}-{attempt}")
    changes = {"schedule.max_steps": STEPS, "schedule.accumulate": 8, "parallel.processes": processes}
    run = replace(run, config=override(run.config, changes))
    raise_fence(store, key, attempt)
    store.put(f"{attempt_key(key, attempt)}/run.json", dump(to_json(run)))
    return subprocess.Popen(
        [sys.executable, "-m", "services.finetune", "train", run_uri(store.uri, key, attempt)],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        start_new_session=True,
    )


def events(store: Store, attempt: int, key: str) -> list[dict[str, Any]]:
    return [e for _, segment in read_segments(store, key, attempt, -1) for e in segment]


def losses(store: Store, attempt: int, key: str = KEY) -> dict[int, float]:
    return {e["step"]: e["values"]["loss"] for e in events(store, attempt, key) if e["type"] == "metric"}


def until(worker: subprocess.Popen[bytes], true: Callable[[], bool]) -> None:
    while not true():
        assert worker.poll() is None
        time.sleep(0.1)


def rank_pid(worker: subprocess.Popen[bytes], rank: int) -> int:
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = f"PPid:\t{worker.pid}\n" in path.read_text()
            environ = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent and f"RANK={rank}".encode() in environ:
            return int(path.parent.name)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_eight_ranks_four_ranks_and_one_are_one_run(file_store: Store, tmp_path: Path) -> None:
    """A stopped rank, a killed one and a SIGTERM: each attempt goes on from the last one's checkpoint."""
    worker = start(file_store, tmp_path, 1, 8)
    until(worker, lambda: newest_checkpoint(file_store, KEY, 2) is not None)
    os.kill(rank_pid(worker, 5), signal.SIGSTOP)
    began = time.monotonic()
    assert worker.wait(300) == 1
    print(f"a stopped rank of eight was found and all ended in {time.monotonic() - began:.1f} s")
    fault = read_fault(file_store, KEY, 1)
    assert fault is not None and (fault["reason"], fault["metadata"]["rank"]) == ("RANK_HUNG", "5")

    worker = start(file_store, tmp_path, 2, 4)
    until(worker, lambda: len(losses(file_store, 2)) > 2)
    os.kill(rank_pid(worker, 2), signal.SIGKILL)
    began = time.monotonic()
    assert worker.wait(300) == 1
    print(f"a killed rank of four was found and all ended in {time.monotonic() - began:.1f} s")
    fault = read_fault(file_store, KEY, 2)
    assert fault is not None and "rank 2 was killed by SIGKILL" in fault["message"]

    worker = start(file_store, tmp_path, 3, 8)
    until(worker, lambda: len(losses(file_store, 3)) > 2)
    os.killpg(worker.pid, signal.SIGTERM)
    assert worker.wait(300) == 0
    ended = read_outcome(file_store, KEY)
    assert ended is not None and ended[1].state == "CANCELLED"
    kept = newest_checkpoint(file_store, KEY, 4)
    assert kept is not None and kept[0] >= max(losses(file_store, 3))

    # As the service does after a SIGTERM that nobody asked it for.
    file_store.put("jobs/j/lease.json", dump({"attempt": 3, "outcome": None}))
    assert start(file_store, tmp_path, 4, 8).wait(900) == 0
    assert start(file_store, tmp_path, 1, 1, "jobs/one").wait(300) == 0
    one = losses(file_store, 1, "jobs/one")
    assert len(one) == STEPS and max(losses(file_store, 4)) == STEPS
    worst = 0.0
    for attempt in (1, 2, 3, 4):
        found = losses(file_store, attempt)
        assert found == pytest.approx({step: one[step] for step in found}, abs=1e-3)
        worst = max(worst, *(abs(found[step] - one[step]) for step in found))
    assert {step for attempt in (1, 2, 3, 4) for step in losses(file_store, attempt)} == set(one)
    print(f"largest difference from one process over {STEPS} steps: {worst:.1e}")
