"""Pausing as users do it: a real worker saves and leaves, and what goes on later ends as if nothing had been."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.client.client import Client
from services.finetune.store import open_store
from services.finetune.store.artifacts import load
from tests.e2e.stack import Stack
from tests.tiny import tiny_model

OPTIONS = [
    "schedule.max_steps=200",
    "report.log_every=1",
    "report.checkpoint_every=50",
    "data.max_length=64",
    "lora.rank=2",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A tiny model and a small dataset."""
    folder = tmp_path_factory.mktemp("paused")
    tiny_model(folder / "tiny")
    with (folder / "d.jsonl").open("w") as out:
        for n in range(64):
            turns = [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]
            out.write(json.dumps({"messages": turns}) + "\n")
    stack = Stack(folder / "home").start()
    done(stack, "model", "import", str(folder / "tiny"), "--name", "tiny")
    done(stack, "dataset", "create", "d", str(folder / "d.jsonl"))
    yield stack
    stack.stop()


def done(stack: Stack, *words: str) -> subprocess.CompletedProcess[str]:
    made = stack.quartet(*words)
    assert made.returncode == 0, (made.stdout, made.stderr)
    return made


def words(job: str) -> list[str]:
    what = ["train", "smollm2_135m_lora_assistant_e1", "--base", "tiny", "--data", "d", "--name", job]
    return [*what, "--cfg-options", *OPTIONS]


def events(stack: Stack, job: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done(stack, "job", "logs", job, "--json").stdout.splitlines()]


def pause_at(stack: Stack, job: str, kind: str) -> dict[str, Any]:
    """Pause a job at its first event of a kind, as soon as it is told, and wait until it is."""
    with Client(stack.address) as client:
        name = client.name("trainingJobs", job)
        next(event for event in client.watch(name) if event.WhichOneof("event") == kind)
        client.pause(name)
    paused: dict[str, Any] = json.loads(done(stack, "job", "pause", job, "--wait", "--json").stdout)
    assert paused["state"] == "PAUSED"
    return paused


def adapter(stack: Stack, job: str) -> str:
    """The digest of its last adapter."""
    saved = [e["checkpoint"]["digest"] for e in events(stack, job) if "checkpoint" in e]
    return load(open_store((stack.home / "store").as_uri()), saved[-1]).file("adapter_model.safetensors").digest


def test_paused_and_resumed_it_ends_as_if_it_had_not_been(tiny: Stack) -> None:
    done(tiny, *words("whole"))
    done(tiny, *words("parted"), "--detach")
    assert pause_at(tiny, "parted", "metric").get("progress", {}).get("step", 0) < 200
    resumed = done(tiny, "job", "resume", "parted", "--wait")
    assert "going on after step" in resumed.stdout and resumed.stdout.splitlines()[-1] == "SUCCEEDED"
    assert adapter(tiny, "parted") == adapter(tiny, "whole")
    refused = tiny.quartet("job", "pause", "parted")
    assert refused.returncode == 78 and "ended SUCCEEDED" in refused.stderr


def test_other_jobs_cannot_be_paused(tiny: Stack, tmp_path: Path) -> None:
    tiny_model(tmp_path / "other", seed=1)
    job = json.loads(done(tiny, "model", "import", str(tmp_path / "other"), "--name", "other", "--json").stdout)
    refused = tiny.quartet("job", "pause", job["name"])
    assert refused.returncode == 64 and "is no training job" in refused.stderr
