"""A tiny run in this process, and what it told."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.finetune.config import RunConfig, override
from services.finetune.orders import ArtifactRef, TrainRun
from services.finetune.progress import Attempt, Event, raise_fence, read_segments
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, load, materialise, publish, publish_directory
from services.finetune.train.loop import Trainer
from tests.tiny import tiny_model

META = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "generation": {"eos_token_id": [2]}}
CONFIG = {
    "method": "lora",
    "model.dtype": "float32",
    "quant.bits": 0,
    "lora.rank": 4,
    "lora.dropout": 0.0,
    "optim.lr": 2e-2,
    "data.max_length": 96,
    "schedule.epochs": 3,
    "schedule.accumulate": 2,
    "report.log_every": 1,
    "report.checkpoint_every": 3,
}


def dataset(store: Store, rows: Sequence[tuple[str, str]]) -> ArtifactRef:
    text = "".join(json.dumps({"instruction": asked, "output": said}) + "\n" for asked, said in rows)
    blob = store.put_blob(text.encode())
    files = (File("a.jsonl", blob.digest, blob.size),)
    digest = publish(store, Manifest("dataset", files, (), {"format": "alpaca", "rows": len(rows)}))
    return ArtifactRef(name=f"workspaces/default/datasets/d/revisions/{digest[7:15]}", digest=digest)


def numbers(first: int, last: int) -> list[tuple[str, str]]:
    return [(f"say {n}", f"{n} it is") for n in range(first, last)]


def order(store: Store, folder: Path, rows: Sequence[tuple[str, str]] | None = None, **changes: Any) -> TrainRun:
    """An order to train a tiny model; keys of the config with __ for the dots."""
    base = publish_directory(store, "base", tiny_model(folder / "tiny"), meta=META)
    config = override(RunConfig(), {**CONFIG, **{key.replace("__", "."): value for key, value in changes.items()}})
    return TrainRun(
        job="workspaces/default/trainingJobs/t",
        config=config,
        base=ArtifactRef(name="workspaces/default/models/tiny", digest=base),
        datasets=(dataset(store, numbers(0, 48) if rows is None else rows),),
    )


def run(
    store: Store, what: TrainRun, folder: Path, key: str, attempt: int = 1, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Train to the end, as an attempt at a job; what train returns."""
    raise_fence(store, key, attempt)
    workdir = folder / key / str(attempt)
    workdir.mkdir(parents=True)
    with Attempt(store, key, attempt) as held:
        return Trainer(what, held, stop or threading.Event(), workdir).run()


def told(store: Store, key: str, kind: str, attempt: int = 1) -> list[Event]:
    events = [e for _, segment in read_segments(store, key, attempt, -1) for e in segment]
    return [e for e in events if e["type"] == kind]


def report(store: Store, key: str, folder: Path, attempt: int = 1) -> Path:
    """The files of an attempt's last report."""
    digest = told(store, key, "report", attempt)[-1]["digest"]
    return materialise(store, load(store, digest), folder / f"report-{digest[7:15]}")


def lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file, compressed or not."""
    data = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines()]
