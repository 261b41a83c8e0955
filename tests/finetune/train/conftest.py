"""Training in this process: a tiny model, some rows, and what a run reported and left."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from services.finetune.config import RunConfig, override
from services.finetune.convert import convert
from services.finetune.orders import AdapterTask, ArtifactRef, ConvertRun, MergeTask, TrainRun
from services.finetune.progress import Attempt, raise_fence, read_segments
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, load, materialise, publish, publish_directory
from services.finetune.train import train
from tests.tiny import tiny_model

META = {
    "architecture": "LlamaForCausalLM",
    "template": "tokenizer",
    "system": "",
    "generation": {"eos_token_id": [2]},
    "context_length": 512,
    "dtype": "float32",
}
ROWS = 8
CHANGES: dict[str, Any] = {
    "method": "lora",
    "quant.bits": 0,
    "model.dtype": "float32",
    "lora.rank": 4,
    "lora.dropout": 0.0,
    "optim.name": "adamw",
    "optim.lr": 1e-2,
    "data.max_length": 192,
    "schedule.kind": "constant",
    "schedule.accumulate": 2,  # each step sees every row
    "schedule.max_steps": 4,
    "report.log_every": 1,
    "report.checkpoint_every": 2,
}


@dataclass
class Ran:
    checkpoints: dict[int, str] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    folder: Path = Path()

    @property
    def last(self) -> str:
        return self.checkpoints[max(self.checkpoints)]

    def said(self, text: str) -> bool:
        return any(text in log for log in self.logs)


class Bench:
    """A store with a base model and a dataset, on which jobs are run."""

    def __init__(self, store: Store, tmp: Path, model: Path) -> None:
        self.store, self.tmp, self.model = store, tmp, model
        self.base = publish_directory(store, "base", model, meta=META)
        lines = "".join(json.dumps({"instruction": f"say {n}", "output": f"{n} it is"}) + "\n" for n in range(ROWS))
        blob = store.put_blob(lines.encode())
        files = (File("a.jsonl", blob.digest, blob.size),)
        self.data = publish(store, Manifest("dataset", files, (), {"format": "alpaca", "rows": ROWS}))
        self._jobs = 0

    def train(self, resume: str = "", **changes: Any) -> Ran:
        """Keys of `changes` have __ for a dot."""
        self._jobs += 1
        named = {key.replace("__", "."): value for key, value in changes.items()}
        run = TrainRun(
            job="workspaces/default/trainingJobs/t",
            config=override(RunConfig(), {**CHANGES, **named}),
            base=ArtifactRef(name="workspaces/default/models/tiny", digest=self.base),
            datasets=(ArtifactRef(name="workspaces/default/datasets/d/revisions/r1", digest=self.data),),
            resume=ArtifactRef(name="before", digest=resume) if resume else None,
        )
        key = f"jobs/t{self._jobs}"
        ran = Ran(folder=self._folder())
        with self._attempt(key) as attempt:
            train(run, attempt, threading.Event(), ran.folder)
        for event in (e for _, segment in read_segments(self.store, key, 1, -1) for e in segment):
            if event["type"] == "metric":
                for name, found in (("loss", ran.losses), ("validation_loss", ran.looks)):
                    found += [event["values"][name]] if name in event["values"] else []
            elif event["type"] == "sample":
                ran.answers.append(event["answer"])
            elif event["type"] == "log":
                ran.logs.append(event["text"])
            elif event["type"] == "checkpoint":
                ran.checkpoints[event["step"]] = event["digest"]
        return ran

    def convert(self, checkpoint: str, dtype: str = "float32") -> tuple[str, Path]:
        """What conversion makes of a checkpoint: its digest, and its files."""
        named = ArtifactRef(name="checkpoint", digest=checkpoint)
        return self._convert(adapter=AdapterTask(checkpoint=named, dtype=dtype))

    def merge(self, adapter: str) -> tuple[str, Path]:
        named, base = ArtifactRef(name="adapter", digest=adapter), ArtifactRef(name="base", digest=self.base)
        return self._convert(merge=MergeTask(adapter=named, base=base))

    def _convert(self, **task: Any) -> tuple[str, Path]:
        self._jobs += 1
        with self._attempt(f"jobs/c{self._jobs}") as attempt:
            order = ConvertRun(job="workspaces/w/conversionJobs/j", **task)
            made = convert(order, attempt, threading.Event(), self._folder())["model"]
        return made, materialise(self.store, load(self.store, made), self._folder())

    def files(self, checkpoint: str) -> dict[str, str]:
        """Digests of what a run goes on from."""
        return {
            f.path: f.digest
            for f in load(self.store, checkpoint).files
            if f.path not in ("run_config.json", "steps.jsonl.gz")
        }

    def _attempt(self, key: str) -> Attempt:
        raise_fence(self.store, key, 1)
        attempt = Attempt(self.store, key, 1)
        attempt.claim({"pid": 1})
        return attempt

    def _folder(self) -> Path:
        self._jobs += 1
        folder = self.tmp / f"work{self._jobs}"
        folder.mkdir()
        return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", hidden_size=64)


@pytest.fixture
def bench(file_store: Store, tmp_path: Path, tiny: Path) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads would wait for each other longer than they work
    yield Bench(file_store, tmp_path, tiny)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
