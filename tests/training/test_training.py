"""The training room over its real server; the workers are tests/common/worker.py."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import pytest
from google.protobuf import json_format
from quartet.training.v1 import training_pb2 as pb
from quartet.training.v1.training_pb2_grpc import TrainingStub, add_TrainingServicer_to_server

from services.common import wire
from services.common.jobs import Jobs
from services.common.records import Records
from services.common.server import Room
from services.common.status import from_rpc_error
from services.finetune.devices import Device
from services.finetune.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unimplemented,
)
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import get_ref, put_ref
from services.training.planning import Planner
from services.training.servicer import Servicer
from services.training.usecases import Training
from tests.common.jobbing import ScriptLauncher
from tests.common.serving import W, fresh, put_dataset, put_model, refused, serve

RECIPE = "smollm2_135m_lora_assistant_e1"
QLORA = "smollm2_135m_qlora_assistant_e1"
TERMINAL = (pb.TrainingJob.SUCCEEDED, pb.TrainingJob.FAILED, pb.TrainingJob.CANCELLED)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("t")


@pytest.fixture(scope="module")
def store(home: Path) -> Store:
    made = open_store((home / "store").as_uri())
    put_model(made, "base")
    put_model(made, "adapter", "adapter")
    put_model(made, "small", "quantized")
    put_model(made, "tower", "vision_tower")
    put_model(made, "merged", "merged")
    put_model(made, "plain", template="")
    put_dataset(made, "d")
    return made


@pytest.fixture(scope="module")
def room(home: Path, store: Store) -> Iterator[TrainingStub]:
    training = Training(store, Planner(store, Device()))
    records = Records(f"sqlite:///{home}/q.db")
    training.jobs = Jobs(records, store, ScriptLauncher(home), training.work, max_workers=4, grace_s=5)
    servicer = Servicer(training)
    made = Room(
        "quartet.training.v1.Training",
        lambda server: add_TrainingServicer_to_server(servicer, server),
        training.jobs.start,
        training.jobs.stop,
    )
    with serve(made, home) as channel:
        yield TrainingStub(channel)
    records.close()


def request(job_id: str = "", overrides: dict[str, Any] | None = None, **given: Any) -> pb.CreateTrainingJobRequest:
    rest = {k: given.pop(k) for k in ("request_id", "validate_only", "parent") if k in given}
    job: dict[str, Any] = {"recipe": RECIPE, "base_model": f"{W}/models/base"}
    job |= {"datasets": [f"{W}/datasets/d/revisions/latest"], **given}
    made = pb.TrainingJob(**job, overrides=wire.to_struct(overrides or {}))
    return pb.CreateTrainingJobRequest(**{"parent": W, **rest}, training_job_id=job_id, training_job=made)


def watch(room: TrainingStub, name: str, after: int = 0) -> list[pb.TrainingEvent]:
    return list(room.WatchTrainingJob(pb.WatchTrainingJobRequest(name=name, after_sequence=after), timeout=40))


def test_whole_job(room: TrainingStub) -> None:
    labels = {"team": fresh("x")}
    made = room.CreateTrainingJob(request(display_name="A job", labels=labels, overrides={"optim.lr": 0.5}))
    assert made.state == pb.TrainingJob.QUEUED and made.attempt == 0
    assert list(made.datasets) == [f"{W}/datasets/d/revisions/r1"]
    config = json_format.MessageToDict(made.config)
    assert config["optim"]["lr"] == 0.5 and config["quant"]["bits"] == 0
    events = watch(room, made.name)
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    saved = [e.checkpoint for e in events if e.WhichOneof("event") == "checkpoint"]
    assert [c.name for c in saved] == [f"{made.name}/checkpoints/{n}" for n in (10, 20)]
    assert watch(room, made.name, 3) == events[3:]
    job = room.GetTrainingJob(pb.GetTrainingJobRequest(name=made.name))
    assert (job.state, job.result, job.attempt) == (pb.TrainingJob.SUCCEEDED, saved[-1].name, 1)
    assert (job.progress.step, job.progress.total_steps) == (3, 9) and job.etag != made.etag
    assert made.create_time.ToNanoseconds() <= job.start_time.ToNanoseconds() <= job.end_time.ToNanoseconds()
    listed = room.ListCheckpoints(pb.ListCheckpointsRequest(parent=made.name, order_by="step desc", page_size=1))
    assert [c.step for c in listed.checkpoints] == [20] and listed.next_page_token
    assert listed.checkpoints[0].digest == saved[-1].digest and listed.checkpoints[0].loss == 0.5
    wanted = f'state = "SUCCEEDED" AND labels.team = "{labels["team"]}"'
    found = room.ListTrainingJobs(pb.ListTrainingJobsRequest(parent=W, filter=wanted))
    assert [j.name for j in found.training_jobs] == [made.name]
    # What it saved can be gone on from.
    resumed = room.CreateTrainingJob(request(resume_from=saved[0].name, validate_only=True))
    assert resumed.resume_from == saved[0].name


def test_request_id_is_one_job(room: TrainingStub) -> None:
    rid, job = fresh("r"), fresh("j")
    made = room.CreateTrainingJob(request(job, request_id=rid))
    assert room.CreateTrainingJob(request(job, request_id=rid)).name == made.name
    with refused(InvalidArgument, "REQUEST_ID_REUSED"):
        room.CreateTrainingJob(request(job, {"optim.lr": 1}, request_id=rid))
    with refused(AlreadyExists, "JOB_EXISTS"):
        room.CreateTrainingJob(request(job))


def test_validate_only_changes_nothing(room: TrainingStub) -> None:
    made = room.CreateTrainingJob(request(fresh("dry"), validate_only=True))
    assert made.config.fields and made.state == pb.TrainingJob.QUEUED
    with refused(NotFound, "JOB_NOT_FOUND"):
        room.GetTrainingJob(pb.GetTrainingJobRequest(name=made.name))


@pytest.mark.parametrize(
    ("given", "cls", "reason"),
    [
        ({"recipe": "smollm2_135m_lora_assistnt_e1"}, NotFound, "RECIPE_UNKNOWN"),
        ({"recipe": "deepspeed_zero2"}, InvalidArgument, "RECIPE_NOT_TRAINABLE"),
        ({"base_model": f"{W}/models/none"}, NotFound, "MODEL_NOT_FOUND"),
        ({"base_model": ""}, NotFound, "MODEL_NOT_FOUND"),
        ({"base_model": "", "recipe": ""}, InvalidArgument, "MODEL_MISSING"),
        ({"base_model": "../../x"}, InvalidArgument, "NAME_MALFORMED"),
        ({"base_model": f"{W}/models/adapter"}, FailedPrecondition, "MODEL_NOT_TRAINABLE"),
        ({"base_model": f"{W}/models/small"}, FailedPrecondition, "MODEL_NOT_TRAINABLE"),
        ({"base_model": f"{W}/models/tower"}, FailedPrecondition, "MODEL_NOT_TRAINABLE"),
        ({"base_model": f"{W}/models/plain"}, FailedPrecondition, "TEMPLATE_MISSING"),
        ({"datasets": []}, InvalidArgument, "DATASET_MISSING"),
        ({"datasets": [f"{W}/datasets/none/revisions/latest"]}, NotFound, "REVISION_NOT_FOUND"),
        ({"datasets": [f"{W}/datasets/d/revisions/r2"]}, NotFound, "REVISION_NOT_FOUND"),
        ({"datasets": ["../../../etc/revisions/latest"]}, InvalidArgument, "NAME_MALFORMED"),
        ({"resume_from": f"{W}/trainingJobs/none/checkpoints/1"}, NotFound, "CHECKPOINT_NOT_FOUND"),
        ({"overrides": {"optim.lrr": 1}}, InvalidArgument, "CONFIG_KEY_UNKNOWN"),
        ({"overrides": {"optim.lr": "fast"}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"overrides": {"schedule.epochs": 1.5}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"overrides": {"schedule.batch_size": 0}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"parent": "workspaces/W"}, InvalidArgument, "NAME_MALFORMED"),
        ({"overrides": {"lora.rank_pattern": {"q_proj": 0}}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"overrides": {"lora.loraplus_lr_ratio": 0}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"overrides": {"optim.beta2": 1}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"overrides": {"model.freeze": ["lm_head"]}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"overrides": {"data.weights": [1, 2]}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"overrides": {"data.weights": [0]}}, InvalidArgument, "CONFIG_VALUE_INVALID"),
        ({"job_id": "Bad Id"}, InvalidArgument, "NAME_MALFORMED"),
    ],
)
def test_what_is_refused(room: TrainingStub, given: dict[str, Any], cls: Any, reason: str) -> None:
    with refused(cls, reason) as error:
        room.CreateTrainingJob(request(**given))
    assert "Traceback" not in error[0].message


def test_lora_takes_the_base_as_it_is(room: TrainingStub) -> None:
    """Whatever the recipe says of quantisation, and whole numbers stay whole on the wire and back."""
    wanted = request(recipe=QLORA, overrides={"method": "lora", "schedule.epochs": 2}, validate_only=True)
    made = wire.from_struct(room.CreateTrainingJob(wanted).config)
    assert (made["method"], made["quant"]["bits"]) == ("lora", 0)
    assert made["schedule"]["epochs"] == 2 and isinstance(made["schedule"]["epochs"], int)


def test_what_the_trainer_cannot_act_on_is_refused_by_name(room: TrainingStub) -> None:
    """Whatever a config may hold is acted on or refused, never left out."""
    lacking: dict[str, Any] = {
        "report.measures": ["mmlu"],
    }
    with refused(Unimplemented, "TRAINER_LACKS") as error:
        room.CreateTrainingJob(request(overrides=lacking))
    assert [v.field for v in error[0].violations] == list(lacking)
    zero: dict[str, Any] = {"parallel.deepspeed": "deepspeed_zero3"}
    assert room.CreateTrainingJob(request(overrides=zero, validate_only=True)).name
    lacking = {"optim.name": "lion", "model.dtype": "float16"}
    with refused(Unimplemented, "TRAINER_LACKS") as error:
        room.CreateTrainingJob(request(overrides={**zero, **lacking}))
    assert [v.field for v in error[0].violations] == list(lacking)
    for overrides in ({"method": "int8_lora"}, {"method": "full"}, {"method": "qlora", "quant.kind": "fp4"}):
        room.CreateTrainingJob(request(overrides={**overrides, "data.max_rows": 20000}, validate_only=True))
    with refused(InvalidArgument, "CONFIG_VALUE_INVALID"):
        room.CreateTrainingJob(request(overrides={"method": "qlora", "quant.bits": 8}))


def test_every_one_of_the_seeds_recipes_is_taken_or_refused_by_name(room: TrainingStub) -> None:
    """Measures, presets and templates that are not there yet are the only reasons."""
    seed = room.ListRecipes(pb.ListRecipesRequest(page_size=1000, filter='since = "seed"')).recipes
    assert len(seed) == 301
    taken = []
    for recipe in seed:
        try:
            taken.append(room.CreateTrainingJob(request(recipe=recipe.name, validate_only=True)).recipe)
        except grpc.RpcError as error:
            assert from_rpc_error(error).reason in ("TRAINER_LACKS", "TEMPLATE_UNKNOWN", "RECIPE_NOT_TRAINABLE")
    assert "recipes/internlm_chat_7b_qlora_oasst1_e3" in taken


def test_a_base_is_found_by_where_it_came_from(room: TrainingStub, store: Store) -> None:
    for n, name in enumerate(("older", "newer")):
        put_model(store, name)
        ref = get_ref(store, f"{W}/models/{name}")
        assert ref is not None
        body = {
            **ref.body,
            "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "create_time": f"2026-01-0{n + 1}T00:00:00Z",
        }
        put_ref(store, ref.name, body)
    made = room.CreateTrainingJob(request(base_model="", validate_only=True))
    assert made.base_model == f"{W}/models/newer"


def test_a_config_of_its_own_needs_no_recipe(room: TrainingStub) -> None:
    overrides = {"method": "lora", "optim.lr": 3e-4, "report.prompts": ["hello"]}
    made = room.CreateTrainingJob(request(recipe="", overrides=overrides, validate_only=True))
    config = wire.from_struct(made.config)
    assert made.recipe == "" and config["optim"]["lr"] == 3e-4 and config["report"]["prompts"] == ["hello"]


def test_plain_base_with_a_named_template(room: TrainingStub) -> None:
    wanted: dict[str, Any] = {
        "base_model": f"{W}/models/plain",
        "overrides": {"data.template": "chatml"},
        "validate_only": True,
    }
    assert room.CreateTrainingJob(request(**wanted)).name
    assert room.CreateTrainingJob(request(base_model=f"{W}/models/merged", validate_only=True)).name


def test_cancel_and_delete(room: TrainingStub) -> None:
    name = room.CreateTrainingJob(request(fresh("slow"))).name
    stream = room.WatchTrainingJob(pb.WatchTrainingJobRequest(name=name), timeout=40)
    while next(stream).WhichOneof("event") != "metric":
        pass
    with refused(FailedPrecondition, "JOB_NOT_ENDED"):
        room.DeleteTrainingJob(pb.DeleteTrainingJobRequest(name=name))
    room.CancelTrainingJob(pb.CancelTrainingJobRequest(name=name))
    assert list(stream)[-1].state.state == pb.TrainingJob.CANCELLED
    job = room.CancelTrainingJob(pb.CancelTrainingJobRequest(name=name))
    with refused(Aborted, "ETAG_MISMATCH"):
        room.DeleteTrainingJob(pb.DeleteTrainingJobRequest(name=name, etag="1"))
    room.DeleteTrainingJob(pb.DeleteTrainingJobRequest(name=name, etag=job.etag))
    with refused(NotFound, "JOB_NOT_FOUND"):
        room.GetTrainingJob(pb.GetTrainingJobRequest(name=name))


def test_pause_and_resume(room: TrainingStub) -> None:
    name = room.CreateTrainingJob(request(fresh("slow"))).name
    stream = room.WatchTrainingJob(pb.WatchTrainingJobRequest(name=name), timeout=40)
    while next(stream).WhichOneof("event") != "metric":
        pass
    wanted = pb.PauseTrainingJobRequest(name=name, request_id=fresh("p"))
    room.PauseTrainingJob(wanted)
    while (event := next(stream)).state.state != pb.TrainingJob.PAUSED:
        pass
    assert "starts anew" in event.state.message
    job = room.GetTrainingJob(pb.GetTrainingJobRequest(name=name))
    assert job.state == pb.TrainingJob.PAUSED and not job.HasField("end_time")
    found = room.ListTrainingJobs(pb.ListTrainingJobsRequest(parent=W, filter='state = "PAUSED"'))
    assert name in [j.name for j in found.training_jobs]
    with refused(InvalidArgument, "REQUEST_ID_REUSED"):
        room.ResumeTrainingJob(pb.ResumeTrainingJobRequest(name=name, request_id=wanted.request_id))
    assert room.ResumeTrainingJob(pb.ResumeTrainingJobRequest(name=name)).state == pb.TrainingJob.QUEUED
    while next(stream).WhichOneof("event") != "metric":
        pass
    assert room.PauseTrainingJob(wanted).state == pb.TrainingJob.RUNNING, "an old pause that comes again pauses nothing"
    room.CancelTrainingJob(pb.CancelTrainingJobRequest(name=name))
    assert list(stream)[-1].state.state == pb.TrainingJob.CANCELLED
    both: list[tuple[Any, Any]] = [
        (room.PauseTrainingJob, pb.PauseTrainingJobRequest),
        (room.ResumeTrainingJob, pb.ResumeTrainingJobRequest),
    ]
    for ask, message in both:
        with refused(FailedPrecondition, "JOB_ENDED"):
            ask(message(name=name))
        with refused(NotFound, "JOB_NOT_FOUND"):
            ask(message(name=f"{W}/trainingJobs/none"))
        with refused(InvalidArgument, "NAME_MALFORMED"):
            ask(message(name="none"))


def test_delete_forgets_checkpoints(room: TrainingStub, store: Store) -> None:
    name = room.CreateTrainingJob(request(fresh("j"))).name
    assert watch(room, name)[-1].state.state == pb.TrainingJob.SUCCEEDED
    room.DeleteTrainingJob(pb.DeleteTrainingJobRequest(name=name))
    with refused(NotFound, "CHECKPOINT_NOT_FOUND"):
        room.CreateTrainingJob(request(resume_from=f"{name}/checkpoints/20"))
    with refused(NotFound, "JOB_NOT_FOUND"):
        room.ListCheckpoints(pb.ListCheckpointsRequest(parent=name))


def test_files_are_listed_and_sent(room: TrainingStub, store: Store) -> None:
    name = room.CreateTrainingJob(request(fresh("filed"))).name
    assert not room.ListTrainingFiles(pb.ListTrainingFilesRequest(parent=name)).files
    assert watch(room, name)[-1].state.state == pb.TrainingJob.SUCCEEDED
    listed = room.ListTrainingFiles(pb.ListTrainingFilesRequest(parent=name, page_size=1))
    rest = room.ListTrainingFiles(pb.ListTrainingFilesRequest(parent=name, page_token=listed.next_page_token))
    files = [*listed.files, *rest.files]
    assert [f.path for f in files] == ["loss.png", "tensorboard/events"] and not rest.next_page_token

    def sent(**what: Any) -> bytes:
        pieces = list(room.DownloadTrainingFile(pb.DownloadTrainingFileRequest(name=name, **what)))
        assert all(google_crc32c.value(p.data) == p.crc32c for p in pieces)
        return b"".join(p.data for p in pieces)

    data = sent(path="tensorboard/events", digest=files[1].digest)
    assert len(data) == files[1].size_bytes == 3_000_000
    assert sent(path="tensorboard/events", offset_bytes=2_999_998) == data[-2:]
    with refused(NotFound, "FILE_NOT_FOUND"):
        sent(path="../loss.png")
    with refused(OutOfRange, "OFFSET_WRONG"):
        sent(path="loss.png", offset_bytes=10**9)
    with refused(Aborted, "FILE_CHANGED"):
        sent(path="loss.png", digest=files[1].digest)
    with refused(NotFound, "JOB_NOT_FOUND"):
        room.ListTrainingFiles(pb.ListTrainingFilesRequest(parent=f"{W}/trainingJobs/none"))
    room.DeleteTrainingJob(pb.DeleteTrainingJobRequest(name=name))
    assert get_ref(store, f"{name}/report") is None


@pytest.mark.parametrize(
    ("keep_best", "kept"), [(False, [40, 50]), (True, [20, 40, 50])], ids=["the last two", "and the best"]
)
def test_only_checkpoints_that_are_kept_keep_their_names(
    room: TrainingStub, store: Store, keep_best: bool, kept: list[int]
) -> None:
    """The worker saves ten to fifty; of them twenty is the best, and another job begins from ten."""
    asked = {"report.keep_last": 2, "report.keep_best": keep_best}
    name = room.CreateTrainingJob(request(fresh("keeps"), asked)).name
    ref = f"{name}/checkpoints/10"
    deadline = time.monotonic() + 40
    while get_ref(store, ref) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    room.CreateTrainingJob(request(fresh("after"), resume_from=ref))
    store.put(f"go/{name}", b"")
    assert watch(room, name)[-1].state.state == pb.TrainingJob.SUCCEEDED
    listed = room.ListCheckpoints(pb.ListCheckpointsRequest(parent=name)).checkpoints
    assert [c.step for c in listed] == [10, *kept]
    assert [c.validation_loss for c in listed if c.step == 20] == [0.1] * keep_best


def test_failed_job_tells_why(room: TrainingStub) -> None:
    name = room.CreateTrainingJob(request(fresh("faulty"))).name
    last = watch(room, name)[-1].state
    assert last.state == pb.TrainingJob.FAILED and "user's fault" in last.message
    job = room.GetTrainingJob(pb.GetTrainingJobRequest(name=name))
    from services.common.status import from_status

    assert from_status(job.error).reason == "DATASET_EMPTY"


def test_watch_refuses(room: TrainingStub) -> None:
    with refused(NotFound, "JOB_NOT_FOUND"):
        watch(room, f"{W}/trainingJobs/none")
    with refused(InvalidArgument, "NAME_MALFORMED"):
        watch(room, "none")
    name = room.CreateTrainingJob(request(fresh("j"))).name
    with refused(OutOfRange, "SEQUENCE_UNKNOWN"):
        watch(room, name, 10**15)


def test_recipes(room: TrainingStub) -> None:
    first = room.ListRecipes(pb.ListRecipesRequest(page_size=3))
    second = room.ListRecipes(pb.ListRecipesRequest(page_size=3, page_token=first.next_page_token))
    names = [r.name for r in [*first.recipes, *second.recipes]]
    assert names == sorted(set(names)) and len(names) == 6 and not first.recipes[0].HasField("config")
    lora = room.ListRecipes(pb.ListRecipesRequest(filter='method = "lora"', page_size=1000))
    assert lora.recipes and {r.method for r in lora.recipes} == {"lora"}
    ours = room.ListRecipes(pb.ListRecipesRequest(filter='since = "quartet"', page_size=1000)).recipes
    assert ours and {r.since for r in ours} == {"quartet"}
    whole = room.GetRecipe(pb.GetRecipeRequest(name=f"recipes/{RECIPE}"))
    assert whole.name == f"recipes/{RECIPE}" and "schedule" in whole.config.fields
    with refused(NotFound, "RECIPE_UNKNOWN"):
        room.GetRecipe(pb.GetRecipeRequest(name="recipes/nothing_like_it"))
    with refused(InvalidArgument, "ORDER_BY_UNKNOWN"):
        room.ListTrainingJobs(pb.ListTrainingJobsRequest(parent=W, order_by="size"))
