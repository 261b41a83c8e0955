"""Fifty times kill -9 of real training workers: every one goes on, and every run ends as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.finetune.config import override, to_json
from services.finetune.orders import TrainRun
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, run_uri
from services.finetune.store import Store
from tests.finetune.train.killing import kill_often
from tests.finetune.train.test_train import final, run, start

__all__ = ["run"]  # a fixture
SEED = 20


class Worker:
    """Jobs of one order, one after another; each start is a job's next attempt."""

    def __init__(self, store: Store, order: TrainRun, folder: Path) -> None:
        self.store, self.order, self.folder = store, order, folder
        self.job, self.attempt = 0, 0
        folder.mkdir()

    @property
    def key(self) -> str:
        return f"jobs/cut{self.job}"

    def start(self) -> subprocess.Popen[bytes]:
        if self.ended():
            self.job, self.attempt = self.job + 1, 0
        self.attempt += 1
        raise_fence(self.store, self.key, self.attempt)
        self.store.put(f"{attempt_key(self.key, self.attempt)}/run.json", dump(to_json(self.order)))
        command = [
            sys.executable,
            "-m",
            "services.finetune",
            "train",
            run_uri(self.store.uri, self.key, self.attempt),
        ]
        return subprocess.Popen(command, env={**os.environ, "TMPDIR": str(self.folder)})

    def ended(self) -> bool:
        return read_outcome(self.store, self.key) is not None


@pytest.mark.slow
def test_fifty_kills(file_store: Store, run: TrainRun, tmp_path: Path) -> None:
    changes = {"lora.dropout": 0.1, "schedule.epochs": 60, "report.checkpoint_every": 5}
    order = TrainRun(job=run.job, config=override(run.config, changes), base=run.base, datasets=run.datasets)
    assert start(file_store, order, "jobs/whole", 1).wait(600) == 0
    worker = Worker(file_store, order, tmp_path / "work")
    toll = kill_often(worker, kills=50, seed=SEED)
    print(f"seed {SEED}: {toll}")
    assert toll.kills == 50 and not toll.lost and toll.in_writes >= 10
    for job in range(worker.job + 1):
        assert final(file_store, f"jobs/cut{job}") == final(file_store, "jobs/whole"), f"job {job} differs"
