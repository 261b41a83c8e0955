"""Real training jobs for the benchmarks: bases of random weights, rows, workers, and what these told."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.common.launchers.local import WAITING
from services.finetune.config import RunConfig, override, to_json
from services.finetune.orders import ArtifactRef, ConvertRun, TrainRun
from services.finetune.progress import attempt_key, dump, raise_fence, read_fault, read_outcome, read_segments, run_uri
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, load, materialise, publish, publish_directory
from services.finetune.train.steplog import NAME, read_log
from tests.bench.train_shapes import random_causal
from tests.tiny import tiny_tokenizer

META = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "generation": {"eos_token_id": [2]}}
GPU = torch.cuda.is_available()


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that came to its end."""

    checkpoint: str
    """Digest of its last one."""
    metrics: list[dict[str, Any]]
    """{"time", "step", "values"}, in order."""
    logs: list[str]

    def values(self, name: str) -> list[float]:
        return [e["values"][name] for e in self.metrics if name in e["values"]]


def steps_of(store: Store, checkpoint: str) -> list[dict[str, Any]]:
    """The step log in a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return read_log(materialise(store, load(store, checkpoint), Path(folder), [NAME]) / NAME)


def rates(store: Store, ended: Ended, warm: int, each: int = 2) -> list[float]:
    """Tokens/s of every `each` steps after the first `warm`, by when they were told: a step is told while a later one runs,
    so the time of a single one means little."""
    tokens = {line["step"]: line["tokens"] for line in steps_of(store, ended.checkpoint)}
    told = [e for e in ended.metrics if e["step"] >= warm][::each]
    return [
        sum(tokens[step] for step in range(a["step"] + 1, b["step"] + 1)) / (b["time"] - a["time"])
        for a, b in itertools.pairwise(told)
    ]


def put_base(store: Store, shape: str) -> str:
    """A base of this shape; made once for a store. Its tokenizer has a token for each byte."""
    if found := store.get(f"bench/{shape}"):
        return found.data.decode()
    model = random_causal(shape, torch.bfloat16 if GPU else torch.float32)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model.save_pretrained(folder, max_shard_size="4GB")
        del model
        if GPU:
            torch.cuda.empty_cache()
        digest = publish_directory(store, "base", tiny_tokenizer(folder), meta=META)
    store.put(f"bench/{shape}", digest.encode())
    return digest


def put_rows(store: Store, count: int, length: int = 0) -> str:
    """Rows of some 400 tokens each, or such as fill a block of `length` each."""
    said = "y" * (length - 64) if length else ""
    rows = ({"instruction": f"say {n:8}", "output": said or f"{n} it is. " * 40} for n in range(count))
    blob = store.put_blob("".join(json.dumps(row) + "\n" for row in rows).encode())
    files = (File("a.jsonl", blob.digest, blob.size),)
    return publish(store, Manifest("dataset", files, (), {"format": "alpaca", "rows": count}))


def order(base: str, data: str, changes: Mapping[str, Any], resume: str = "") -> TrainRun:
    return TrainRun(
        job="bench",
        config=override(RunConfig(), changes),
        base=ArtifactRef(name="base", digest=base),
        datasets=(ArtifactRef(name="rows", digest=data),),
        resume=ArtifactRef(name="before", digest=resume) if resume else None,
    )


def start(store: Store, run: TrainRun | ConvertRun, key: str, attempt: int = 1) -> subprocess.Popen[bytes]:
    """A worker at an attempt of a job."""
    raise_fence(store, key, attempt)
    store.put(f"{attempt_key(key, attempt)}/run.json", dump(to_json(run)))
    command = [sys.executable, "-m", "services.finetune", run.kind, run_uri(store.uri, key, attempt)]
    return subprocess.Popen(command, env={**os.environ, **WAITING})


def end(store: Store, key: str, attempt: int = 1) -> Ended:
    """What a trainer that is gone left behind. RuntimeError if it did not succeed."""
    checkpoint = _result(store, key, attempt)["checkpoint"]
    events = [e for _, segment in read_segments(store, key, attempt, -1) for e in segment]
    metrics = [e for e in events if e["type"] == "metric"]
    logs = [e["text"] for e in events if e["type"] == "log"]
    return Ended(checkpoint, metrics, logs)


def job(store: Store, run: TrainRun, key: str) -> Ended:
    """Run a whole job."""
    start(store, run, key).wait()
    return end(store, key)


def convert(store: Store, key: str, **task: Any) -> str:
    """Run a whole conversion; the digest of what it made."""
    start(store, ConvertRun(job="bench", **task), key).wait()
    return str(_result(store, key, 1)["model"])


def _result(store: Store, key: str, attempt: int) -> Mapping[str, Any]:
    outcome = read_outcome(store, key)
    if outcome is None or outcome[1].state != "SUCCEEDED":
        raise RuntimeError(f"{key}: {outcome[1].error if outcome else read_fault(store, key, attempt)}")
    return outcome[1].result
