"""What a config says of pace and of samples is what the loop does."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from services.finetune.config import RunConfig, ScheduleConfig, override, to_json
from services.finetune.errors import FailedPrecondition
from services.finetune.orders import ArtifactRef, TrainRun
from services.finetune.progress import Attempt, raise_fence, read_segments
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, Parent, load, publish, publish_directory
from services.finetune.train import train
from services.finetune.train.checkpoint import check_same
from services.finetune.train.optim import rate
from tests.tiny import tiny_model


def test_warm_up_by_steps_takes_the_place_of_its_ratio() -> None:
    schedule = ScheduleConfig(warmup_ratio=0.5, warmup_steps=4)
    assert [rate(step, 100, schedule) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rate(49, 100, ScheduleConfig(warmup_ratio=0.5)) == 1.0


def test_going_on_looks_at_what_base_and_rows_are_not_where_they_came_from() -> None:
    base, data = (ArtifactRef(name=n, digest=f"sha256:{n}") for n in ("base", "data"))
    parents = (Parent("base", base.digest, base.name), Parent("dataset", data.digest, data.name))
    moved = {"model.checkpoint": "./here", "data.sources": [{"files": ["./rows.jsonl"]}], "schedule.max_steps": 9}
    run = TrainRun(job="j", config=override(RunConfig(), moved), base=base, datasets=(data,))
    check_same(run, to_json(RunConfig()), parents)
    with pytest.raises(FailedPrecondition, match=r"optim\.lr"):
        check_same(run, to_json(override(RunConfig(), {"optim.lr": 1.0})), parents)


def test_samples_have_a_system_text_of_their_own(file_store: Store, tmp_path: Path) -> None:
    meta = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "generation": {"eos_token_id": [2]}}
    base = publish_directory(file_store, "base", tiny_model(tmp_path / "tiny"), meta=meta)
    blob = file_store.put_blob(json.dumps({"instruction": "hi", "output": "ho"}).encode())
    files = (File("a.jsonl", blob.digest, blob.size),)
    data = publish(file_store, Manifest("dataset", files, (), {"format": "alpaca", "rows": 1}))

    def run(key: str, **changes: Any) -> tuple[str, str]:
        """The answer to the prompt, and the adapter's digest."""
        plain = {"method": "lora", "quant.bits": 0, "data.max_length": 64, "schedule.max_steps": 1}
        config = override(RunConfig(), {**plain, "report.prompts": ["hi"], "report.sample_tokens": 8, **changes})
        order = TrainRun(
            job="workspaces/default/trainingJobs/t",
            config=config,
            base=ArtifactRef(name="workspaces/default/models/tiny", digest=base),
            datasets=(ArtifactRef(name="workspaces/default/datasets/d/revisions/r1", digest=data),),
        )
        raise_fence(file_store, key, 1)
        (tmp_path / key).mkdir(parents=True)
        with Attempt(file_store, key, 1) as attempt:
            done = train(order, attempt, threading.Event(), tmp_path / key)
        events = [e for _, segment in read_segments(file_store, key, 1, -1) for e in segment]
        (answer,) = (e["answer"] for e in events if e["type"] == "sample")
        return answer, load(file_store, done["checkpoint"]).file("adapter_model.safetensors").digest

    plain, own = run("jobs/plain"), run("jobs/own", **{"report.system": "Say it loud and clear."})
    assert own[0] != plain[0] and own[1] == plain[1]
    learned = run("jobs/learned", **{"data.system": "Say it loud and clear."})
    assert learned[1] != plain[1]
