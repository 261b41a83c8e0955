"""The conversion room over its real server; the workers are tests/common/worker.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from quartet.conversion.v1 import conversion_pb2 as pb
from quartet.conversion.v1.conversion_pb2_grpc import ConversionStub

from services.common import names, wire
from services.common.status import from_status
from services.finetune.errors import (
    Aborted,
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
)
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import Parent, put_ref
from tests.common.serving import W, fresh, put_dataset, put_model, refused
from tests.conversion.rooms import serving

CHECKPOINT = f"{W}/trainingJobs/j/checkpoints/10"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("c")


@pytest.fixture(scope="module")
def roots(home: Path) -> Path:
    """An import root with a model, one whose file leads out, and a folder beside it."""
    for folder in ("in/model", "in/leak", "out"):
        (home / folder).mkdir(parents=True)
        (home / folder / "config.json").write_text("{}")
    (home / "in/leak/tokenizer.json").symlink_to(home / "out/config.json")
    (home / "in/link").symlink_to(home / "out")
    return home / "in"


@pytest.fixture(scope="module")
def store(home: Path) -> Store:
    made = open_store((home / "store").as_uri())
    base = put_model(made, "base")
    put_model(made, "other")
    put_model(made, "tower", "vision_tower")
    put_model(made, "adapter", "adapter", (Parent("base", base, f"{W}/models/base"),))
    put_dataset(made, "files")
    put_ref(made, CHECKPOINT, {"digest": "sha256:" + "c" * 64, "step": 10, "loss": 1.0, "create_time": names.now()})
    return made


@pytest.fixture(scope="module")
def room(home: Path, store: Store, roots: Path) -> Iterator[ConversionStub]:
    with serving(home, store, [roots]) as stub:
        yield stub


def request(target: str = "", job_id: str = "", **given: Any) -> pb.CreateConversionJobRequest:
    rest = {k: given.pop(k) for k in ("request_id", "validate_only") if k in given}
    job = pb.ConversionJob(target_model=f"{W}/models/{target or fresh('m')}", **given)
    return pb.CreateConversionJobRequest(parent=W, conversion_job_id=job_id, conversion_job=job, **rest)


def watch(room: ConversionStub, name: str, after: int = 0) -> list[pb.ConversionEvent]:
    return list(room.WatchConversionJob(pb.WatchConversionJobRequest(name=name, after_sequence=after), timeout=40))


ADAPTER: dict[str, Any] = {"adapter": pb.AdapterTask(checkpoint=CHECKPOINT)}
REV, BASE, TOWER = f"{W}/datasets/files/revisions/r1", f"{W}/models/base", f"{W}/models/tower"
TASKS: dict[str, dict[str, Any]] = {
    "BASE": {"import_model": pb.ImportTask(revision=f"{W}/datasets/files/revisions/r1")},
    "ADAPTER": ADAPTER,
    "MERGED": {"merge": pb.MergeTask(adapter=f"{W}/models/adapter", base=f"{W}/models/base")},
}


@pytest.mark.parametrize("kind", TASKS)
def test_whole_job(room: ConversionStub, kind: str) -> None:
    made = room.CreateConversionJob(request(labels={"a": "b"}, display_name="Mine", **TASKS[kind]))
    (task,) = TASKS[kind]
    assert made.WhichOneof("task") == task and getattr(made, task) == TASKS[kind][task]
    events = watch(room, made.name)
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert {e.WhichOneof("event") for e in events} == {"state", "log", "progress"}
    assert watch(room, made.name, 2) == events[2:]
    job = room.GetConversionJob(pb.GetConversionJobRequest(name=made.name))
    assert job.state == pb.ConversionJob.SUCCEEDED and (job.progress.done_bytes, job.progress.total_bytes) == (5, 10)
    model = room.GetModel(pb.GetModelRequest(name=job.target_model))
    assert (pb.Model.Kind.Name(model.kind), dict(model.labels), model.display_name) == (kind, {"a": "b"}, "Mine")
    assert wire.from_struct(model.generation) == {"eos_token_id": [2]}
    assert model.size_bytes == sum(f.size_bytes for f in model.files) > 0


def test_an_assembly_is_a_job_as_any(room: ConversionStub) -> None:
    task = pb.AssembleTask(language_model=BASE, vision_tower=TOWER, seed=3, feature_layer=-1, pad_to_square=True)
    made = room.CreateConversionJob(request(assemble=task))
    assert made.assemble == task
    watch(room, made.name)
    assert room.GetModel(pb.GetModelRequest(name=made.target_model)).kind == pb.Model.BASE


def test_an_import_remembers_its_hub_id(room: ConversionStub) -> None:
    """By it a recipe's base model is found again."""
    for task, source in (({"import_model": pb.ImportTask(hub_id="a/b")}, "a/b"), (ADAPTER, "")):
        made = room.CreateConversionJob(request(**task))
        watch(room, made.name)
        assert room.GetModel(pb.GetModelRequest(name=made.target_model)).source == source


def test_request_id_and_names(room: ConversionStub) -> None:
    rid, target, job = fresh("r"), fresh("m"), fresh("j")
    made = room.CreateConversionJob(request(target, job, request_id=rid, **ADAPTER))
    watch(room, made.name)
    # The model is there by now; the same request still gives the first answer.
    assert room.CreateConversionJob(request(target, job, request_id=rid, **ADAPTER)).name == made.name
    with refused(InvalidArgument, "REQUEST_ID_REUSED"):
        room.CreateConversionJob(request(target, job, request_id=rid, **TASKS["MERGED"]))
    with refused(AlreadyExists, "MODEL_EXISTS"):
        room.CreateConversionJob(request(target, **ADAPTER))
    with refused(AlreadyExists, "JOB_EXISTS"):
        room.CreateConversionJob(request("", job, **ADAPTER))
    dry = room.CreateConversionJob(request(validate_only=True, **ADAPTER))
    with refused(NotFound, "JOB_NOT_FOUND"):
        room.GetConversionJob(pb.GetConversionJobRequest(name=dry.name))


def test_race_for_one_name(room: ConversionStub) -> None:
    """Two jobs for one model: the second may not say that its model is there."""
    target = fresh("m")
    jobs = [room.CreateConversionJob(request(target, **ADAPTER)).name for _ in range(2)]
    for name in jobs:
        watch(room, name)
    ends = [room.GetConversionJob(pb.GetConversionJobRequest(name=name)) for name in jobs]
    assert sorted(pb.ConversionJob.State.Name(job.state) for job in ends) == ["FAILED", "SUCCEEDED"]
    (failed,) = (job for job in ends if job.state == pb.ConversionJob.FAILED)
    assert from_status(failed.error).reason == "MODEL_EXISTS"


MERGE = f"{W}/models/adapter"


@pytest.mark.parametrize(
    ("given", "cls", "reason"),
    [
        ({}, InvalidArgument, "TASK_MISSING"),
        ({"import_model": pb.ImportTask()}, InvalidArgument, "TASK_MISSING"),
        ({"import_model": pb.ImportTask(hub_id="a/b", dtype="int3")}, InvalidArgument, "DTYPE_UNKNOWN"),
        ({"import_model": pb.ImportTask(hub_id="a/b", template="chatmI")}, InvalidArgument, "TEMPLATE_UNKNOWN"),
        ({"import_model": pb.ImportTask(revision=f"{W}/datasets/x/revisions/r1")}, NotFound, "REVISION_NOT_FOUND"),
        ({"import_model": pb.ImportTask(local_path="/etc")}, PermissionDenied, "LOCAL_PATH_FORBIDDEN"),
        ({"import_model": pb.ImportTask(local_path="IN/../out")}, PermissionDenied, "LOCAL_PATH_FORBIDDEN"),
        ({"import_model": pb.ImportTask(local_path="IN/link")}, PermissionDenied, "LOCAL_PATH_FORBIDDEN"),
        ({"import_model": pb.ImportTask(local_path="IN/leak")}, PermissionDenied, "LOCAL_PATH_FORBIDDEN"),
        ({"import_model": pb.ImportTask(local_path="model")}, PermissionDenied, "LOCAL_PATH_FORBIDDEN"),
        ({"import_model": pb.ImportTask(local_path="IN/none")}, NotFound, "MODEL_NOT_FOUND"),
        ({"adapter": pb.AdapterTask(checkpoint=CHECKPOINT + "1")}, NotFound, "CHECKPOINT_NOT_FOUND"),
        ({"adapter": pb.AdapterTask(checkpoint="x")}, InvalidArgument, "NAME_MALFORMED"),
        ({"adapter": pb.AdapterTask(checkpoint=CHECKPOINT, dtype="x")}, InvalidArgument, "DTYPE_UNKNOWN"),
        ({"adapter": pb.AdapterTask()}, InvalidArgument, "TASK_MISSING"),
        ({"adapter": pb.AdapterTask(checkpoint=CHECKPOINT, revision=REV, base=BASE)}, InvalidArgument, "TASK_MISSING"),
        ({"adapter": pb.AdapterTask(checkpoint=CHECKPOINT, base=BASE)}, InvalidArgument, "TASK_INVALID"),
        ({"adapter": pb.AdapterTask(checkpoint=CHECKPOINT, lora_alpha=2)}, InvalidArgument, "TASK_INVALID"),
        ({"adapter": pb.AdapterTask(revision=REV)}, InvalidArgument, "TASK_INVALID"),
        ({"adapter": pb.AdapterTask(revision=REV, base=BASE, lora_alpha=-1)}, InvalidArgument, "TASK_INVALID"),
        (
            {"adapter": pb.AdapterTask(revision=REV, base=BASE, max_shard_size_bytes=-1)},
            InvalidArgument,
            "SHARD_SIZE_INVALID",
        ),
        ({"adapter": pb.AdapterTask(revision=REV, base=f"{W}/models/adapter")}, FailedPrecondition, "MODEL_NOT_WHOLE"),
        ({"adapter": pb.AdapterTask(revision=REV + "2", base=BASE)}, NotFound, "REVISION_NOT_FOUND"),
        ({"assemble": pb.AssembleTask(language_model=BASE, vision_tower=BASE)}, FailedPrecondition, "MODEL_NOT_TOWER"),
        (
            {"assemble": pb.AssembleTask(language_model=TOWER, vision_tower=TOWER)},
            FailedPrecondition,
            "MODEL_NOT_WHOLE",
        ),
        ({"assemble": pb.AssembleTask(language_model=BASE, vision_tower=MERGE)}, FailedPrecondition, "MODEL_NOT_TOWER"),
        ({"assemble": pb.AssembleTask(language_model=BASE)}, InvalidArgument, "NAME_MALFORMED"),
        (
            {"assemble": pb.AssembleTask(language_model=BASE, vision_tower=TOWER, seed=-1)},
            InvalidArgument,
            "TASK_INVALID",
        ),
        ({"merge": pb.MergeTask(adapter=f"{W}/models/none")}, NotFound, "MODEL_NOT_FOUND"),
        ({"merge": pb.MergeTask(adapter=f"{W}/models/base")}, FailedPrecondition, "MODEL_NOT_ADAPTER"),
        ({"merge": pb.MergeTask(adapter=MERGE, base=f"{W}/models/other")}, FailedPrecondition, "BASE_MISMATCH"),
        ({"merge": pb.MergeTask(adapter=MERGE, max_shard_size_bytes=-1)}, InvalidArgument, "SHARD_SIZE_INVALID"),
        ({"merge": pb.MergeTask(adapter=MERGE, base_dtype="fp4")}, InvalidArgument, "DTYPE_UNKNOWN"),
        ({"merge": pb.MergeTask(adapter=MERGE, report="maybe")}, InvalidArgument, "TASK_INVALID"),
        ({"target": "base", **ADAPTER}, AlreadyExists, "MODEL_EXISTS"),
        ({"target": "Bad Name", **ADAPTER}, InvalidArgument, "NAME_MALFORMED"),
    ],
)
def test_what_is_refused(room: ConversionStub, roots: Path, given: dict[str, Any], cls: Any, reason: str) -> None:
    if "import_model" in given and given["import_model"].local_path.startswith("IN/"):
        path = given["import_model"].local_path.replace("IN", str(roots))
        given = {"import_model": pb.ImportTask(local_path=path)}
    with refused(cls, reason):
        room.CreateConversionJob(request(**given))


def test_a_foreign_checkpoint_becomes_an_order(room: ConversionStub) -> None:
    task = pb.AdapterTask(revision=REV, base=BASE, lora_alpha=16.5, dtype="float16", max_shard_size_bytes=10**9)
    made = room.CreateConversionJob(request(adapter=task))
    assert made.adapter == task
    assert watch(room, made.name)[-1].state.state == pb.ConversionJob.SUCCEEDED


def test_import_from_an_allowed_place(room: ConversionStub, roots: Path) -> None:
    made = room.CreateConversionJob(request(import_model=pb.ImportTask(local_path=f"{roots}/model")))
    assert watch(room, made.name)[-1].state.state == pb.ConversionJob.SUCCEEDED


def test_cancel(room: ConversionStub) -> None:
    made = room.CreateConversionJob(request(job_id=fresh("slow"), **ADAPTER))
    room.CancelConversionJob(pb.CancelConversionJobRequest(name=made.name))
    assert watch(room, made.name)[-1].state.state == pb.ConversionJob.CANCELLED
    with refused(NotFound, "MODEL_NOT_FOUND"):
        room.GetModel(pb.GetModelRequest(name=made.target_model))
    found = room.ListConversionJobs(pb.ListConversionJobsRequest(parent=W, filter='state = "CANCELLED"'))
    assert made.name in [job.name for job in found.conversion_jobs]


def test_models_are_listed_in_pages(room: ConversionStub) -> None:
    adapters = room.ListModels(pb.ListModelsRequest(parent=W, filter='kind = "ADAPTER" AND labels.of = "adapter"'))
    assert [m.name for m in adapters.models] == [f"{W}/models/adapter"]
    seen: list[str] = []
    token = ""
    while not seen or token:
        page = room.ListModels(pb.ListModelsRequest(parent=W, page_size=2, page_token=token))
        seen += [m.name for m in page.models]
        token = page.next_page_token
    assert seen == sorted(set(seen)) and f"{W}/models/base" in seen
    with refused(InvalidArgument, "FILTER_MALFORMED"):
        room.ListModels(pb.ListModelsRequest(parent=W, filter="kind >"))


def test_delete_model(room: ConversionStub, store: Store) -> None:
    put_model(store, "brief")
    name = f"{W}/models/brief"
    etag = room.GetModel(pb.GetModelRequest(name=name)).etag
    with refused(Aborted, "ETAG_MISMATCH"):
        room.DeleteModel(pb.DeleteModelRequest(name=name, etag="x"))
    room.DeleteModel(pb.DeleteModelRequest(name=name, etag=etag))
    with refused(NotFound, "MODEL_NOT_FOUND"):
        room.DeleteModel(pb.DeleteModelRequest(name=name))


def download(room: ConversionStub, model: str, path: str, offset: int = 0) -> list[pb.DownloadModelResponse]:
    wanted = pb.DownloadModelRequest(name=f"{W}/models/{model}", path=path, offset_bytes=offset)
    return list(room.DownloadModel(wanted, timeout=20))


def test_download(room: ConversionStub, store: Store) -> None:
    put_model(store, "tenletters")
    (file,) = (
        f
        for f in room.GetModel(pb.GetModelRequest(name=f"{W}/models/tenletters")).files
        if f.path == "model.safetensors"
    )
    pieces = download(room, "tenletters", file.path)
    assert len(pieces) == 2 and all(len(p.data) <= 1 << 20 for p in pieces)
    assert all(google_crc32c.value(p.data) == p.crc32c for p in pieces)
    whole = b"".join(p.data for p in pieces)
    assert "sha256:" + hashlib.sha256(whole).hexdigest() == file.digest
    rest = b"".join(p.data for p in download(room, "tenletters", file.path, 1_500_000))
    assert rest == whole[1_500_000:]
    assert download(room, "tenletters", file.path, len(whole)) == []
    for offset in (-1, len(whole) + 1):
        with refused(OutOfRange, "OFFSET_WRONG"):
            download(room, "tenletters", file.path, offset)
    with refused(NotFound, "FILE_NOT_FOUND"):
        download(room, "tenletters", "../x")
    with refused(NotFound, "MODEL_NOT_FOUND"):
        download(room, "none", file.path)


def test_download_of_damaged_bytes(room: ConversionStub, store: Store, home: Path) -> None:
    put_model(store, "damaged")
    (file,) = (
        f for f in room.GetModel(pb.GetModelRequest(name=f"{W}/models/damaged")).files if f.path != "config.json"
    )
    (blob,) = (p for p in (home / "store").rglob(f"*{file.digest[-20:]}*") if p.is_file())
    blob.chmod(0o644)
    data = bytearray(blob.read_bytes())
    data[7] ^= 1
    blob.write_bytes(data)
    with refused(DataLoss, "BLOB_CORRUPT"):
        download(room, "damaged", file.path)
