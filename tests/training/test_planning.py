"""Plans over the wire: a real model's files, real rows, a device that may be too small; and how they read."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from quartet.training.v1 import training_pb2 as pb
from quartet.training.v1.training_pb2_grpc import TrainingStub, add_TrainingServicer_to_server

from services.client import plans
from services.common import names, wire
from services.common.jobs import Jobs
from services.common.records import Record, Records
from services.common.server import Room
from services.finetune import plan as planning
from services.finetune.config import RunConfig, from_json, override
from services.finetune.devices import GIB, Device
from services.finetune.errors import InvalidArgument, ResourceExhausted
from services.finetune.orders import ArtifactRef, PrepareRun, TrainRun
from services.finetune.prepare import prepare
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import File, Manifest, publish, publish_directory, put_ref
from services.training.planning import Planner, _batch
from services.training.sampling import figures
from services.training.servicer import Servicer
from services.training.usecases import Training
from tests.common.jobbing import ScriptLauncher
from tests.common.serving import W, put_dataset, put_model, refused, serve
from tests.finetune.train.llava import rows_with_images, tiny_llava
from tests.tiny import tiny_model, tiny_sight

ROWS = 3000
OVERRIDES: dict[str, Any] = {"method": "lora", "data.max_length": 256, "schedule.accumulate": 4, "schedule.epochs": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("p")


@pytest.fixture(scope="module")
def store(home: Path) -> Store:
    """A tiny model, rows of two lengths in a file that is sampled, and names with nothing real behind them."""
    made = open_store((home / "store").as_uri())
    meta = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "generation": {"eos_token_id": [2]}}
    digest = publish_directory(made, "base", tiny_model(home / "tiny"), meta=meta)
    put_ref(made, f"{W}/models/tiny", {"digest": digest, "kind": "base", "create_time": names.now()})
    lines = [
        json.dumps({"instruction": f"say {n}", "output": "y" * (100 if n % 2 else 700), "note": "n" * 300}) + "\n"
        for n in range(ROWS)
    ]
    blob = made.put_blob("".join(lines).encode())
    manifest = Manifest("dataset", (File("a.jsonl", blob.digest, blob.size),), (), {"format": "alpaca", "rows": ROWS})
    put_ref(made, f"{W}/datasets/d/revisions/r1", {"digest": publish(made, manifest), "format": "alpaca"})
    put_model(made, "hollow")
    put_dataset(made, "hollow")
    return made


@pytest.fixture(scope="module")
def training(home: Path, store: Store) -> Iterator[Training]:
    made = Training(store, Planner(store, Device("cpu", 8 * GIB)))
    records = Records(f"sqlite:///{home}/q.db")
    made.jobs = Jobs(records, store, ScriptLauncher(home), made.work, max_workers=1, grace_s=1)
    yield made
    records.close()


@pytest.fixture(scope="module")
def room(home: Path, training: Training) -> Iterator[TrainingStub]:
    servicer = Servicer(training)
    made = Room("quartet.training.v1.Training", lambda s: add_TrainingServicer_to_server(servicer, s))
    with serve(made, home) as channel:
        yield TrainingStub(channel)


def plan(room: TrainingStub, device: pb.PlanDevice | None = None, of: str = "tiny", more: Any = None) -> pb.TrainingJob:
    data = "d" if of == "tiny" else "hollow"
    job = pb.TrainingJob(
        base_model=f"{W}/models/{of}",
        datasets=[f"{W}/datasets/{data}/revisions/r1"],
        overrides=wire.to_struct({**OVERRIDES, **(more or {})}),
    )
    return room.CreateTrainingJob(
        pb.CreateTrainingJobRequest(parent=W, training_job=job, validate_only=True, device=device)
    )


def test_rows_are_estimated_then_known(room: TrainingStub, training: Training, store: Store, home: Path) -> None:
    guess = plan(room).plan
    assert 0 < guess.data.sampled_rows < ROWS and guess.data.rows == ROWS
    assert guess.steps == 2 * guess.steps_per_epoch > 0 and guess.fits == pb.Plan.YES
    assert any("estimate" in told for told in guess.assumptions)
    job = training.create(W, "", _spec(), ("", ""), True)
    run = from_json(TrainRun, job.body["spec"]["run"])
    order = {
        "job": "",
        "model": {"name": "m", "digest": run.base.digest},
        "datasets": [{"name": "d", "digest": d.digest} for d in run.datasets],
        "data": {"template": "tokenizer", "max_length": 256},
    }
    raise_fence(store, "jobs/p", 1)
    with Attempt(store, "jobs/p", 1) as attempt:
        prepare(from_json(PrepareRun, order), attempt, threading.Event(), home)
    known = plan(room).plan
    assert known.data.sampled_rows == 0 and not any("estimate" in told for told in known.assumptions)
    for name in ("tokens", "learned_tokens", "blocks", "samples"):
        exact = getattr(known.data, name)
        assert getattr(guess.data, name) == pytest.approx(exact, rel=0.1), name
    assert known.data.truncated_rows == ROWS // 2 == pytest.approx(guess.data.truncated_rows, rel=0.1)
    assert known.data.block_length == 256
    m = known.memory
    assert m.peak == sum(getattr(m, part) for part in plans.PARTS)


def test_images_count_as_their_tokens(store: Store, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    blob = store.put_blob(
        "".join(json.dumps({"image": "a.png", "conversations": turns}) + "\n" for _ in range(9)).encode()
    )
    picture = store.put_blob(b"not looked at")
    files = (File("a.jsonl", blob.digest, blob.size), File("a.png", picture.digest, picture.size))
    rows = ArtifactRef(name="d", digest=publish(store, Manifest("dataset", files, (), {"format": "llava", "rows": 9})))
    tokens = []
    for side in (28, 56):
        base = publish_directory(
            store, "base", tiny_sight(tmp_path / str(side), side=side), meta={"template": "tokenizer"}
        )
        run = TrainRun(job="j", config=RunConfig(), base=ArtifactRef(name="m", digest=base), datasets=(rows,))
        found = figures(store, run)
        tokens.append(found.tokens)
        assert found.images == 9
    assert tokens[1] - tokens[0] == 9 * (16 - 4)


def _spec() -> dict[str, Any]:
    return {
        "display_name": "",
        "recipe": "",
        "base_model": f"{W}/models/tiny",
        "datasets": [f"{W}/datasets/d/revisions/r1"],
        "validation_datasets": [],
        "overrides": OVERRIDES,
        "resume_from": "",
        "labels": {},
    }


def test_what_does_not_fit_is_told_with_what_does(room: TrainingStub) -> None:
    changes = {"schedule.batch_size": 8, "model.dtype": "float32", "method": "lora"}
    whole = plan(room, more=changes).plan.memory
    job = plan(room, pb.PlanDevice(kind="cpu", memory=whole.peak - whole.activations // 4), more=changes)
    assert job.plan.fits == pb.Plan.NO
    first = job.plan.changes[0]
    overrides = wire.from_struct(first.overrides)
    assert overrides == {"schedule.batch_size": 4, "schedule.accumulate": 8}
    # The change does what it says.
    again = plan(room, pb.PlanDevice(kind="cpu", memory=job.plan.device.memory), more={**changes, **overrides}).plan
    assert again.fits == pb.Plan.YES and again.memory.peak == first.peak
    told = "\n".join(plans.lines(job))
    assert "fits    no: " in told and "--cfg-options schedule.accumulate=8 schedule.batch_size=4" in told
    with pytest.raises(ResourceExhausted, match="does not fit"):
        plans.check_fits(job)


def test_a_stage_of_zero_says_for_how_many(room: TrainingStub) -> None:
    more = {"method": "full", "quant.bits": 0, "parallel.deepspeed": "deepspeed_zero3", "parallel.processes": 4}
    dealt, alone = plan(room, more=more).plan, plan(room, more={**more, "parallel.processes": 1}).plan
    assert (dealt.engine, alone.engine) == ("deepspeed_zero3", "autograd")
    assert any("over 4 processes" in told for told in dealt.assumptions)
    assert dealt.memory.optimizer < alone.memory.optimizer


def test_devices(room: TrainingStub) -> None:
    h100 = plan(room, pb.PlanDevice(kind="h100")).plan
    assert (h100.fits, h100.engine, h100.dtype) == (pb.Plan.YES, "fused", "bfloat16")
    assert 0 < h100.least_s < h100.most_s and h100.device.memory == 80 * GIB
    unnamed = plan(room, pb.PlanDevice(memory=24 * GIB)).plan
    assert unnamed.fits == pb.Plan.YES and unnamed.most_s == 0
    assert any("time is left out" in told for told in unnamed.assumptions)
    with refused(InvalidArgument, "DEVICE_UNKNOWN") as error:
        plan(room, pb.PlanDevice(kind="h1000"))
    assert "did you mean 'h100'" in error[0].message


def test_what_cannot_be_known_is_said_and_fails_nothing(room: TrainingStub) -> None:
    made = plan(room, of="hollow").plan
    assert made.fits == pb.Plan.UNKNOWN and not made.HasField("memory") and not made.HasField("data")
    assert any("the data is not known" in told for told in made.assumptions)
    assert any("memory is not known" in told for told in made.assumptions)


def test_time_goes_by_earlier_jobs_of_the_shape(room: TrainingStub, training: Training) -> None:
    run = training.create(W, "", _spec(), ("", ""), True).body["spec"]["run"]
    body = {"spec": {"run": run}, "attempt": 1, "cancel": False, "progress": {"tokens_per_s": 1000.0}}
    for n, speed in enumerate((1000.0, 2000.0)):
        body = {**body, "progress": {"tokens_per_s": speed}}
        training.jobs.records.create(Record(f"{W}/trainingJobs/before{n}", "trainingJob", "SUCCEEDED", body))
    made = plan(room).plan
    tokens = made.data.tokens * 2
    assert (made.least_s, made.most_s) == pytest.approx((tokens / 2400, tokens / 800))
    assert plan(room, more={"lora.rank": 4}).plan.most_s == 0, "another shape tells nothing"


def test_what_images_keep_is_planned(store: Store, tmp_path: Path) -> None:
    changes = {"method": "lora", "quant.bits": 0, "lora.modules_to_save": ["multi_modal_projector"]}
    config = override(RunConfig(), {**changes, "data.max_length": 96, "schedule.batch_size": 2})
    base = publish_directory(store, "base", tiny_llava(tmp_path / "m"), meta={"template": "tokenizer"})
    rows = ArtifactRef(name="d", digest=rows_with_images(store))
    run = TrainRun(job="j", config=config, base=ArtifactRef(name="m", digest=base), datasets=(rows,))
    planner = Planner(store, Device("cpu", 16 * GIB))
    made = planner.plan(run, None, ())
    assert made.data is not None and made.data.images == 8 and made.memory is not None
    batch = _batch(made, planner._shape(base), config)
    assert batch.images == math.ceil(2 * 8 / made.data.blocks)
    blind = planning.memory(planner._shape(base), config, replace(batch, images=0), made.steps, made.device, made.dtype)
    assert made.memory.activations > blind.activations
