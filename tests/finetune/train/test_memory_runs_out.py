"""Memory that runs out: once it is done with less at a time, twice it is told what would help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from services.finetune.config import to_json
from services.finetune.errors import ResourceExhausted
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, run_uri
from services.finetune.store import Store
from services.finetune.train.engine import Autograd
from services.finetune.train.steplog import NAME, read_log
from tests.finetune.train.running import order, report, run, told

WHOLE: dict[str, Any] = {"schedule__batch_size": 4, "schedule__accumulate": 1, "schedule__epochs": 1}


def test_half_at_a_time_learns_the_same(file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = order(file_store, tmp_path, **WHOLE)
    run(file_store, what, tmp_path, "jobs/whole")
    sizes: list[int] = []
    real = Autograd.backprop

    def backprop(self: Autograd, batch: Any, *given: Any) -> torch.Tensor:
        sizes.append(len(batch))
        loss = real(self, batch, *given)  # its gradients are there when memory runs out, and must not count
        if len(batch) > 2 and len(sizes) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(Autograd, "backprop", backprop)
    run(file_store, what, tmp_path, "jobs/half")
    assert sizes[:8] == [4, 4, 4, 4, 2, 2, 2, 2]
    ours, theirs = (read_log(report(file_store, key, tmp_path) / NAME) for key in ("jobs/half", "jobs/whole"))
    assert [s["blocks"] for s in ours] == [s["blocks"] for s in theirs]
    assert ours[:3] == theirs[:3]
    assert [s["loss"] for s in ours] == pytest.approx([s["loss"] for s in theirs], rel=1e-4)
    assert [s["grad_norm"] for s in ours] == pytest.approx([s["grad_norm"] for s in theirs], rel=1e-3)
    (warning,) = [e["text"] for e in told(file_store, "jobs/half", "log") if e["level"] == "warning"]
    assert warning.startswith("memory ran out at step 4: 2 blocks at a time in place of 4")


def test_a_second_time_it_fails_and_says_what_would_help(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backprop(self: Autograd, *_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Autograd, "backprop", backprop)
    with pytest.raises(ResourceExhausted, match=r"schedule\.batch_size.*data\.max_length.*qlora") as caught:
        run(file_store, order(file_store, tmp_path, **WHOLE), tmp_path, "jobs/j")
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert caught.value.metadata == {"step": "1", "blocks_at_once": "2"}


def test_one_block_at_a_time_runs_layers_twice(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Autograd.backprop, []

    def backprop(self: Autograd, *given: Any) -> torch.Tensor:
        calls.append(self.model.get_base_model().is_gradient_checkpointing)
        if len(calls) == 2:
            raise MemoryError
        return real(self, *given)

    what = order(file_store, tmp_path, schedule__epochs=1)
    run(file_store, what, tmp_path, "jobs/whole")
    monkeypatch.setattr(Autograd, "backprop", backprop)
    run(file_store, what, tmp_path, "jobs/twice")
    assert calls[:2] == [False, False] and all(calls[2:])
    ours, theirs = (read_log(report(file_store, key, tmp_path) / NAME) for key in ("jobs/twice", "jobs/whole"))
    assert [s["loss"] for s in ours] == pytest.approx([s["loss"] for s in theirs], rel=1e-5)


CAPPED = """
import resource, sys
import numpy as np
from services.finetune import __main__ as worker
from services.finetune.train import step

real = step.Stepper.take

def take(self):
    # After the first step, which has made whatever is made once; its blocks take about 200 MB at a time.
    if self.step == 1:
        # OpenBLAS, which draws the curves, ends the process where it finds no memory for its buffers.
        np.ones((256, 256)) @ np.ones((256, 256))
        size = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (size + 150_000_000, resource.RLIM_INFINITY))
    real(self)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

step.Stepper.take = take
sys.exit(worker.main())
"""
"""A worker under a real limit of memory."""


def test_a_real_limit(file_store: Store, tmp_path: Path) -> None:
    """64 blocks of 512 tokens at a time do not fit; 32 do."""
    rows = [(f"say {n}", "it is, " * 60) for n in range(128)]
    changes: dict[str, Any] = {
        "data__max_length": 512,
        "schedule__batch_size": 64,
        "schedule__accumulate": 1,
        "data__pack": False,
    }
    what = order(file_store, tmp_path, rows, **changes, schedule__epochs=2)
    raise_fence(file_store, "jobs/j", 1)
    file_store.put(f"{attempt_key('jobs/j', 1)}/run.json", dump(to_json(what)))
    command = [sys.executable, "-c", CAPPED, "train", run_uri(file_store.uri, "jobs/j", 1)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    ended = read_outcome(file_store, "jobs/j")
    assert ended is not None and ended[1].state == "SUCCEEDED", (ended, done.stderr)
    (warning,) = [e["text"] for e in told(file_store, "jobs/j", "log") if e["level"] == "warning"]
    assert "32 blocks at a time in place of 64" in warning
    assert json.loads((report(file_store, "jobs/j", tmp_path) / "summary.json").read_text())["blocks_at_once"] == 32
