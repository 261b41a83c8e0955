"""Preparing over gRPC, with the real worker: asked however often, it is computed once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.common.status import from_status
from services.finetune.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
)
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import load, publish_directory, put_ref
from tests.common.serving import refused
from tests.datasets.conftest import Service
from tests.datasets.wire import commit, new, row
from tests.tiny import tiny_tokenizer

W = "workspaces/default"
ENDED = (pb.SUCCEEDED, pb.FAILED, pb.CANCELLED)


def put_model(store: Store, name: str, folder: Path, template: str = "tokenizer") -> str:
    """Register a model that is only a tokenizer; its name."""
    full = f"{W}/models/{name}"
    meta = {"template": template}
    put_ref(
        store, full, {"digest": publish_directory(store, "base", tiny_tokenizer(folder), meta=meta), "kind": "base"}
    )
    return full


@pytest.fixture(scope="module")
def store(service: Service) -> Store:
    return open_store((service.home / "store").as_uri())


@pytest.fixture(scope="module")
def model(store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    return put_model(store, "prepare", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def revision(service: Service) -> str:
    return commit(service.stub, new(service.stub), {"a.jsonl": b"".join(row(f"q{n}", f"a{n}") for n in range(20))}).name


def source(revision: str, weight: float = 0.0) -> pb.PrepareSource:
    return pb.PrepareSource(revision=revision, weight=weight)


def request(model: str, *revisions: str, **given: object) -> pb.PrepareDatasetRequest:
    sources = given.pop("sources", [source(r) for r in revisions])
    wanted = {"parent": W, "model": model, "sources": sources, "max_length": 128, **given}
    return pb.PrepareDatasetRequest(**wanted)  # type: ignore[arg-type]


def watch(datasets: DatasetsStub, name: str, after: int = 0) -> list[pb.DatasetEvent]:
    wanted = pb.WatchPreparedDatasetRequest(name=name, after_sequence=after)
    return list(datasets.WatchPreparedDataset(wanted, timeout=60))


def get(datasets: DatasetsStub, name: str) -> pb.PreparedDataset:
    return datasets.GetPreparedDataset(pb.GetPreparedDatasetRequest(name=name))


def test_a_whole_preparation(datasets: DatasetsStub, store: Store, model: str, revision: str) -> None:
    latest = revision.rpartition("/")[0] + "/latest"
    made = datasets.PrepareDataset(request(model, latest, system="Be kind."))
    assert made.state == pb.QUEUED and [(s.revision, s.weight) for s in made.sources] == [(revision, 1.0)]
    assert (made.template, made.max_length, made.system) == ("tokenizer", 128, "Be kind.")
    events = watch(datasets, made.name)
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert watch(datasets, made.name, 2) == events[2:]
    assert events[-1].state.state == pb.SUCCEEDED and any(e.WhichOneof("event") == "log" for e in events)
    done = get(datasets, made.name)
    assert (done.state, done.attempt, done.counts.row_count, done.counts.dropped_row_count) == (pb.SUCCEEDED, 1, 20, 0)
    assert sum(b.row_count for b in done.counts.lengths) == 20 and 0 < done.counts.fill <= 1
    assert done.counts.block_count * 128 * done.counts.fill == pytest.approx(done.counts.token_count)
    manifest = load(store, done.digest)
    assert manifest.kind == "prepared" and manifest.meta["certificate"]["digest"] == done.certificate.digest
    assert done.certificate.template == "tokenizer" and done.certificate.probes[0].token_ids


def test_the_second_time_it_is_there_at_once(datasets: DatasetsStub, model: str, revision: str) -> None:
    first = datasets.PrepareDataset(request(model, revision, max_length=256))
    assert watch(datasets, first.name)[-1].state.state == pb.SUCCEEDED
    began = time.monotonic()
    again = datasets.PrepareDataset(request(model, revision, max_length=256))
    assert time.monotonic() - began < 2
    assert again == get(datasets, first.name) and again.state == pb.SUCCEEDED
    # Under another workspace's name, and when its own name was forgotten, it is found by what it was made from.
    other = datasets.PrepareDataset(request(model, revision, max_length=256, parent="workspaces/other"))
    assert (other.state, other.digest, other.attempt) == (pb.SUCCEEDED, again.digest, 0)
    assert [e.state.state for e in watch(datasets, other.name)] == [pb.QUEUED, pb.SUCCEEDED]
    datasets.DeletePreparedDataset(pb.DeletePreparedDatasetRequest(name=first.name))
    with refused(NotFound, "JOB_NOT_FOUND"):
        get(datasets, first.name)
    anew = datasets.PrepareDataset(request(model, revision, max_length=256))
    assert (anew.name, anew.digest, anew.state) == (first.name, again.digest, pb.SUCCEEDED)


def test_all_that_ask_at_once_get_one(datasets: DatasetsStub, model: str, revision: str) -> None:
    def ask(workspace: str) -> pb.PreparedDataset:
        wanted = request(model, revision, max_length=300, parent=f"workspaces/{workspace}")
        made = datasets.PrepareDataset(wanted)
        watch(datasets, made.name)
        return get(datasets, made.name)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, ["a", "a", "b", "a", "b", "a"]))
    assert len({p.name for p in found}) == 2 and len({p.digest for p in found}) == 1
    assert {p.state for p in found} == {pb.SUCCEEDED} and found[0].digest


def test_what_decides_the_blocks_decides_the_name(datasets: DatasetsStub, model: str, revision: str) -> None:
    def name(**given: object) -> str:
        return datasets.PrepareDataset(request(model, revision, validate_only=True, **given)).name

    different: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"system": "s"},
        {"separate_rows": True},
        {"held_out": 0.25},
        {"template": "vicuna"},
    ]
    names = [name(**g) for g in different] + [name(sources=[source(revision, 2)]), name(sources=[source(revision)] * 2)]
    assert len(set(names)) == len(names)
    assert name(sources=[source(revision, 1.0)]) == name(template="tokenizer") == names[0]
    with refused(NotFound, "JOB_NOT_FOUND"):
        get(datasets, names[1])


def test_weights_and_several_datasets(datasets: DatasetsStub, model: str, revision: str) -> None:
    other = commit(datasets, new(datasets), {"b.jsonl": row("x", "y") * 4}).name
    sources = [source(revision, 2), source(other, 0.5)]
    made = datasets.PrepareDataset(request(model, sources=sources))
    watch(datasets, made.name)
    done = get(datasets, made.name)
    assert done.counts.row_count == 24 and [s.weight for s in done.sources] == [2, 0.5]
    once = datasets.PrepareDataset(request(model, revision, other))
    watch(datasets, once.name)
    one, four = len("y") + 1, sum(len(f"a{n}") + 1 for n in range(20))
    assert get(datasets, once.name).counts.learned_count == four + 4 * one
    assert done.counts.learned_count == 2 * four + 2 * one


def test_rows_are_held_out(datasets: DatasetsStub, store: Store, model: str, revision: str) -> None:
    made = datasets.PrepareDataset(request(model, revision, held_out=0.25))
    watch(datasets, made.name)
    done = get(datasets, made.name)
    meta = load(store, done.digest).meta
    assert done.held_out == 0.25 and done.counts.row_count == 20
    assert (meta["samples"], meta["held_out"]["samples"]) == (15, 5)


@pytest.mark.parametrize("part", [-0.1, 1.0, float("nan")])
def test_a_senseless_part_is_refused(datasets: DatasetsStub, model: str, revision: str, part: float) -> None:
    with refused(InvalidArgument, "CONFIG_VALUE_INVALID") as found:
        datasets.PrepareDataset(request(model, revision, held_out=part))
    assert [v.field for v in found[0].violations] == ["held_out"]


def test_a_failure_is_told_and_tried_again(datasets: DatasetsStub, model: str) -> None:
    revision = commit(datasets, new(datasets), {"a.jsonl": row("q" * 50, "a")}).name
    made = datasets.PrepareDataset(request(model, revision, max_length=16))
    assert watch(datasets, made.name)[-1].state.state == pb.FAILED
    failed = get(datasets, made.name)
    assert from_status(failed.error).reason == "DATASET_EMPTY" and not failed.digest
    again = datasets.PrepareDataset(request(model, revision, max_length=16))
    assert again.name == made.name and again.state == pb.QUEUED and not again.HasField("error")
    assert watch(datasets, again.name)[-1].state.state == pb.FAILED


def test_it_can_be_cancelled_deleted_and_listed(datasets: DatasetsStub, model: str, revision: str) -> None:
    made = datasets.PrepareDataset(request(model, revision, parent="workspaces/cancel", seed=9))
    with refused(FailedPrecondition, "JOB_NOT_ENDED"):
        datasets.DeletePreparedDataset(pb.DeletePreparedDatasetRequest(name=made.name))
    datasets.CancelPreparedDataset(pb.CancelPreparedDatasetRequest(name=made.name))
    assert watch(datasets, made.name)[-1].state.state in ENDED
    listed = datasets.ListPreparedDatasets(pb.ListPreparedDatasetsRequest(parent="workspaces/cancel"))
    assert [p.name for p in listed.prepared_datasets] == [made.name]
    with refused(Aborted, "ETAG_MISMATCH"):
        datasets.DeletePreparedDataset(pb.DeletePreparedDatasetRequest(name=made.name, etag="1"))
    datasets.DeletePreparedDataset(pb.DeletePreparedDatasetRequest(name=made.name))
    assert not datasets.ListPreparedDatasets(
        pb.ListPreparedDatasetsRequest(parent="workspaces/cancel")
    ).prepared_datasets


def test_what_is_refused(datasets: DatasetsStub, store: Store, model: str, revision: str, tmp_path: Path) -> None:
    files = commit(datasets, new(datasets), {"config.json": b"{}"}, format="files").name
    plain = put_model(store, "plain", tmp_path, template="")
    wrong: Iterator[tuple[type[Exception], str, pb.PrepareDatasetRequest]] = iter(
        [
            (InvalidArgument, "DATASET_MISSING", request(model)),
            (InvalidArgument, "DATASET_EMPTY", request(model, revision, files)),
            (InvalidArgument, "MAX_LENGTH_INVALID", request(model, revision, max_length=7)),
            (InvalidArgument, "CONFIG_VALUE_INVALID", request(model, sources=[source(revision, -1)])),
            (InvalidArgument, "CONFIG_VALUE_INVALID", request(model, sources=[source(revision, 1000)])),
            (InvalidArgument, "TEMPLATE_UNKNOWN", request(model, revision, template="vicunia")),
            (InvalidArgument, "NAME_MALFORMED", request(model, revision, parent="default")),
            (InvalidArgument, "NAME_MALFORMED", request("tiny", revision)),
            (NotFound, "MODEL_NOT_FOUND", request(model + "x", revision)),
            (NotFound, "REVISION_NOT_FOUND", request(model, revision + "0")),
        ]
    )
    for cls, reason, asked in wrong:
        with refused(cls, reason):  # type: ignore[arg-type]
            datasets.PrepareDataset(asked)
    with refused(FailedPrecondition, "TEMPLATE_MISSING"):
        (tmp_path / "chat_template.jinja").unlink()
        digest = publish_directory(store, "base", tmp_path, meta={"template": ""})
        put_ref(store, plain, {"digest": digest, "kind": "base"})
        datasets.PrepareDataset(request(plain, revision))
    with refused(NotFound, "JOB_NOT_FOUND"):
        watch(datasets, f"{W}/preparedDatasets/none")
    made = datasets.PrepareDataset(request(model, revision, request_id="one", seed=4))
    assert datasets.PrepareDataset(request(model, revision, request_id="one", seed=4)).name == made.name
    with refused(InvalidArgument, "REQUEST_ID_REUSED"):
        datasets.PrepareDataset(request(model, revision, request_id="one", seed=5))
    with refused(OutOfRange, "SEQUENCE_UNKNOWN"):
        watch(datasets, made.name, 10**15)
    watch(datasets, made.name)
