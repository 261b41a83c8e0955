"""Training on a tiny real model: what is learned, what is isolated, and that kill -9 changes nothing."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from services.finetune import packing
from services.finetune.config import override, to_json
from services.finetune.orders import PrepareRun, TrainRun
from services.finetune.prepare.certificate import certify
from services.finetune.prepare.shelf import shelf_key
from services.finetune.progress import (
    attempt_key,
    dump,
    newest_checkpoint,
    raise_fence,
    read_outcome,
    read_segments,
    run_uri,
)
from services.finetune.store import Store
from services.finetune.store.artifacts import load
from services.finetune.templates import Encoded, load_template
from services.finetune.tokenizer import Tokenizer
from services.finetune.train.model import summed_loss, visible
from tests.finetune.train.running import order
from tests.tiny import tiny_model


@pytest.fixture()
def run(file_store: Store, tmp_path: Path) -> TrainRun:
    return order(file_store, tmp_path, lora__dropout=0.1, model__dtype="auto")


def start(store: Store, run: TrainRun, key: str, attempt: int) -> subprocess.Popen[bytes]:
    raise_fence(store, key, attempt)
    store.put(f"{attempt_key(key, attempt)}/run.json", dump(to_json(run)))
    command = [sys.executable, "-m", "services.finetune", "train", run_uri(store.uri, key, attempt)]
    return subprocess.Popen(command)


def steps(store: Store, key: str, attempt: int) -> list[float]:
    events = [e for _, segment in read_segments(store, key, attempt, -1) for e in segment]
    return [e["values"]["loss"] for e in events if e["type"] == "metric"]


def final(store: Store, key: str) -> tuple[str, str]:
    """The digests of the final adapter and optimizer."""
    ended = read_outcome(store, key)
    assert ended is not None and ended[1].state == "SUCCEEDED", ended
    manifest = load(store, ended[1].result["checkpoint"])
    return manifest.file("adapter_model.safetensors").digest, manifest.file("optimizer.safetensors").digest


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "qlora"])
def test_killed_three_times_it_ends_bit_identical(file_store: Store, run: TrainRun, method: str) -> None:
    changes = {"method": method, "quant.bits": 4 if method == "qlora" else 0, "lora.dropout": 0.1}
    run = TrainRun(job=run.job, config=override(run.config, changes), base=run.base, datasets=run.datasets)
    assert start(file_store, run, "jobs/whole", 1).wait(120) == 0
    losses = steps(file_store, "jobs/whole", 1)
    assert losses[-1] < 0.95 * losses[0]  # a random base can learn only so much by LoRA

    draw = random.Random(method)
    for attempt in (1, 2, 3):
        worker = start(file_store, run, "jobs/cut", attempt)
        while worker.poll() is None and not list(read_segments(file_store, "jobs/cut", attempt, -1)):
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 1.2))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        if read_outcome(file_store, "jobs/cut"):
            break
    worker = start(file_store, run, "jobs/cut", 4)
    assert worker.wait(120) in (0, 75)
    assert final(file_store, "jobs/cut") == final(file_store, "jobs/whole")


def test_sigterm_saves_and_ends_cancelled(file_store: Store, run: TrainRun) -> None:
    run = TrainRun(
        job=run.job,
        config=override(run.config, {"schedule.epochs": 500, "report.checkpoint_every": 100000}),
        base=run.base,
        datasets=run.datasets,
    )
    worker = start(file_store, run, "jobs/term", 1)
    while worker.poll() is None and not steps(file_store, "jobs/term", 1):
        time.sleep(0.05)
    worker.terminate()
    assert worker.wait(30) == 0
    ended = read_outcome(file_store, "jobs/term")
    assert ended is not None and ended[1].state == "CANCELLED"
    assert newest_checkpoint(file_store, "jobs/term", 2) is not None


def test_sigterm_while_another_job_prepares_the_data(file_store: Store, run: TrainRun) -> None:
    """As a pause then: it leaves at once, with nothing saved, and does not disturb the other."""
    tokenizer = Tokenizer.from_artifact(file_store, load(file_store, run.base.digest))
    certificate = certify(tokenizer, load_template("tokenizer", tokenizer))
    data = dataclasses.replace(run.config.data, template="tokenizer")
    order = PrepareRun(job="", model=run.base, datasets=run.datasets, data=data)
    shelf = f"prepared/{shelf_key(order, certificate)}.json"
    file_store.put(shelf, dump({"digest": None, "owner": "jobs/other", "beat": 0}))
    worker = start(file_store, run, "jobs/waits", 1)
    while worker.poll() is None and not list(read_segments(file_store, "jobs/waits", 1, -1)):
        time.sleep(0.02)
    worker.terminate()
    assert worker.wait(30) == 0
    ended = read_outcome(file_store, "jobs/waits")
    assert ended is not None and ended[1].state == "CANCELLED"
    assert newest_checkpoint(file_store, "jobs/waits", 2) is None
    held = file_store.get(shelf)
    assert held is not None and json.loads(held.data)["owner"] == "jobs/other"


def test_a_zombie_stops(file_store: Store, run: TrainRun) -> None:
    raise_fence(file_store, "jobs/zombie", 2)
    file_store.put(f"{attempt_key('jobs/zombie', 1)}/run.json", dump(to_json(run)))
    command = [sys.executable, "-m", "services.finetune", "train", run_uri(file_store.uri, "jobs/zombie", 1)]
    assert subprocess.run(command, capture_output=True).returncode == 75
    assert read_outcome(file_store, "jobs/zombie") is None


class Bare(torch.nn.Module):
    """What summed_loss needs of a PEFT model: the causal model and its trainable parameters."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.causal = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")

    def get_base_model(self) -> torch.nn.Module:
        return self.causal


def test_packed_samples_do_not_see_each_other(tmp_path: Path) -> None:
    model = Bare(tiny_model(tmp_path / "tiny"))
    first, second, other = ([5 + (n * k) % 200 for n in range(20)] for k in (3, 7, 11))

    def loss(*samples: list[int]) -> float:
        learned = Encoded(samples[0], [True] * 20)
        blocks = packing.pack([learned], 64, True)
        arrays = [torch.from_numpy(a.copy()).long() for a in (blocks.ids, blocks.labels, blocks.positions)]
        segments = torch.from_numpy(blocks.segments.copy()).long()
        for n, sample in enumerate(samples[1:], 2):
            at = 20 * (n - 1)
            arrays[0][0, at : at + 20] = torch.tensor(sample)
            arrays[2][0, at : at + 20] = torch.arange(20)
            segments[0, at : at + 20] = n
        with torch.no_grad():
            return float(summed_loss(model, arrays[0], arrays[1], arrays[2], segments))

    alone = loss(first)
    assert loss(first, second) == pytest.approx(alone, rel=1e-5)
    assert loss(first, second) == loss(first, other)
    assert loss(second) != pytest.approx(alone, rel=1e-3)


def test_what_each_token_sees() -> None:
    seen = visible(torch.tensor([[1, 1, 2, 0]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
