"""A real worker that is asked to end: wherever it is, it keeps what there is to keep, and who asks again need not wait."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from services.finetune.config import to_json
from services.finetune.errors import Cancelled
from services.finetune.orders import TrainRun
from services.finetune.progress import attempt_key, checkpoints, dump, raise_fence, read_outcome, run_uri
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, publish
from services.finetune.train.report import Report
from services.finetune.train.steplog import NAME, read_log
from tests.finetune.train.running import dataset, numbers, order, report, told
from tests.finetune.train.running import run as run_here

LONG: dict[str, Any] = {"schedule__epochs": 5000, "report__checkpoint_every": 1000000, "report__log_every": 1}


def start(store: Store, run: TrainRun, key: str) -> subprocess.Popen[bytes]:
    raise_fence(store, key, 1)
    store.put(f"{attempt_key(key, 1)}/run.json", dump(to_json(run)))
    return subprocess.Popen([sys.executable, "-m", "services.finetune", "train", run_uri(store.uri, key, 1)])


def wait(worker: subprocess.Popen[bytes], ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def outcome(store: Store, key: str) -> str:
    ended = read_outcome(store, key)
    assert ended is not None
    return ended[1].state


def test_in_a_look(file_store: Store, tmp_path: Path) -> None:
    """One that takes minutes: what was learned before it is kept, and its loss is for whoever resumes."""
    run = order(file_store, tmp_path, validation__every=2, **LONG)
    run = dataclasses.replace(run, validation=(dataset(file_store, numbers(1000, 9000)),))
    worker = start(file_store, run, "jobs/j")
    wait(worker, lambda: len(told(file_store, "jobs/j", "metric")) == 2)
    worker.terminate()
    assert worker.wait(60) == 0 and outcome(file_store, "jobs/j") == "CANCELLED"
    (saved,) = checkpoints(file_store, "jobs/j", 2).values()
    assert saved["step"] == 2 and "validation_loss" not in saved
    files = report(file_store, "jobs/j", tmp_path)
    assert len(read_log(files / NAME)) == 2
    assert json.loads((files / "summary.json").read_text())["state"] == "CANCELLED"


def test_in_an_answer(file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that goes on and on: at the next token."""
    stop, real = threading.Event(), Report.sample

    def sample(self: Report, *told: Any) -> None:
        real(self, *told)
        stop.set()

    monkeypatch.setattr(Report, "sample", sample)
    prompts = [f"say {n}" for n in range(9)]
    given: dict[str, Any] = {"report__prompts": prompts, "report__sample_every": 1, "report__sample_tokens": 400}
    with pytest.raises(Cancelled):
        run_here(file_store, order(file_store, tmp_path, **given, **LONG), tmp_path, "jobs/j", stop=stop)
    assert list(checkpoints(file_store, "jobs/j", 2)) == [1] and len(told(file_store, "jobs/j", "sample")) == 1


def test_in_preparing_with_helpers_of_its_own(file_store: Store, tmp_path: Path) -> None:
    """The signal goes to the whole group, as a launcher sends it; nothing half-made is kept."""
    run = order(file_store, tmp_path, **LONG)
    line = json.dumps({"instruction": "say it", "output": "it is said, " * 40}).encode() + b"\n"
    blob = file_store.put_blob(line * (80_000_000 // len(line)))
    rows = 80_000_000 // len(line)
    files = (File("a.jsonl", blob.digest, blob.size),)
    digest = publish(file_store, Manifest("dataset", files, (), {"format": "alpaca", "rows": rows}))
    run = dataclasses.replace(run, datasets=(dataclasses.replace(run.datasets[0], digest=digest),))
    raise_fence(file_store, "jobs/j", 1)
    file_store.put(f"{attempt_key('jobs/j', 1)}/run.json", dump(to_json(run)))
    command = [sys.executable, "-m", "services.finetune", "train", run_uri(file_store.uri, "jobs/j", 1)]
    worker = subprocess.Popen(command, start_new_session=True)
    wait(worker, lambda: told(file_store, "jobs/j", "progress"))
    os.killpg(worker.pid, signal.SIGTERM)
    assert worker.wait(60) == 0 and outcome(file_store, "jobs/j") == "CANCELLED"
    assert not checkpoints(file_store, "jobs/j", 2) and not file_store.list("prepared/")
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            os.killpg(worker.pid, 0)
            time.sleep(0.05)


DEAF = """
import sys, time
from services.finetune import __main__ as worker, train

def deaf(run, attempt, stop, workdir):
    for text in ("ready", "asked"):
        attempt.emit("log", level="info", text=text)
        attempt.flush()
        stop.wait()
    time.sleep(600)

train.train = deaf
sys.exit(worker.main())
"""
"""A worker that is in something which nothing can cut short."""


def test_asked_twice_it_ends_at_once(file_store: Store, tmp_path: Path) -> None:
    raise_fence(file_store, "jobs/j", 1)
    file_store.put(f"{attempt_key('jobs/j', 1)}/run.json", dump(to_json(order(file_store, tmp_path))))
    worker = subprocess.Popen([sys.executable, "-c", DEAF, "train", run_uri(file_store.uri, "jobs/j", 1)])

    def logs(count: int) -> bool:
        return len(told(file_store, "jobs/j", "log")) == count

    for count in (1, 2):
        wait(worker, partial(logs, count))
        worker.terminate()
    assert worker.wait(60) == -signal.SIGTERM
