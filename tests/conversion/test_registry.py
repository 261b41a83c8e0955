"""The registry over its real server: what a model tells of itself, who needs it, what it came from, what is garbage."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from quartet.conversion.v1 import conversion_pb2 as pb
from quartet.conversion.v1.conversion_pb2_grpc import ConversionStub

from services.client.commands.registry import tree
from services.common import holding, names, wire
from services.conversion.registry import Registry
from services.finetune.errors import FailedPrecondition, InvalidArgument, NotFound
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import File, Manifest, Parent, publish, put_ref
from services.finetune.store.holds import hold, release
from tests.common.serving import W, fresh, put_model, refused
from tests.conversion.rooms import serving


@pytest.fixture()
def home(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture()
def store(home: Path) -> Store:
    return open_store((home / "store").as_uri())


@pytest.fixture()
def room(home: Path, store: Store) -> Iterator[ConversionStub]:
    with serving(home, store) as stub:
        yield stub


def put(store: Store, name: str, kind: Any, *parents: Parent, **meta: Any) -> str:
    """An artifact with a name: of a model below models/, else as it is written."""
    blob = store.put_blob(name.encode() * 1000)
    files = (File("run_config.json" if kind == "checkpoint" else "f", blob.digest, blob.size),)
    given = {"architecture": "LlamaForCausalLM", "template": "chatml", "generation": {"eos_token_id": [2]}, **meta}
    digest = publish(store, Manifest(kind, files, parents, given))
    body = {"digest": digest, "kind": kind, "display_name": "", "labels": {}, "create_time": names.now(), "job": ""}
    source = {"source": "a/b"} if kind == "base" else {}
    put_ref(store, f"{W}/{name}" if "/" in name else f"{W}/models/{name}", {**body, **source})
    return digest


def family(store: Store) -> dict[str, str]:
    """base + revision -> checkpoint -> adapter -> merged, which is served with nothing beside it; digests by name."""
    base = put(store, "base", "base", dtype="bfloat16", parameters=7, context_length=512)
    data = put(store, "datasets/d/revisions/r1", "dataset")
    above = (Parent("base", base, f"{W}/models/base"), Parent("dataset", data, f"{W}/datasets/d/revisions/r1"))
    checkpoint = put(store, "trainingJobs/j/checkpoints/10", "checkpoint", *above)
    certificate = {"digest": "sha256:c", "tokenizer": "sha256:t", "template": {"name": "chatml", "digest": "sha256:x"}}
    adapter = put(
        store, "adapter", "adapter", *above, Parent("checkpoint", checkpoint, f"{W}/trainingJobs/j/checkpoints/10"),
        certificate=certificate, base_name=f"{W}/models/base", system="Be brief.", report={"tensors": 3}, parameters=2,
    )  # fmt: skip
    merged = put(store, "merged", "merged", Parent("base", base, ""), Parent("adapter", adapter, f"{W}/models/adapter"))
    hold(store, "default.endpoints.e.1", f"{W}/endpoints/e", [merged])
    return {"base": base, "data": data, "checkpoint": checkpoint, "adapter": adapter, "merged": merged}


def delete(room: ConversionStub, model: str, **more: Any) -> None:
    room.DeleteModel(pb.DeleteModelRequest(name=f"{W}/models/{model}", **more))


def get(room: ConversionStub, model: str) -> pb.Model:
    return room.GetModel(pb.GetModelRequest(name=f"{W}/models/{model}"))


def listed(room: ConversionStub, **asked: Any) -> list[str]:
    found = room.ListModels(pb.ListModelsRequest(parent=W, **asked))
    return [m.name.rpartition("/")[2] for m in found.models]


def test_a_model_tells_all_of_itself(room: ConversionStub, store: Store) -> None:
    family(store)
    adapter = get(room, "adapter")
    c = adapter.certificate
    assert (c.digest, c.tokenizer_digest, c.template, c.template_digest) == (
        "sha256:c", "sha256:t", "chatml", "sha256:x",
    )  # fmt: skip
    assert (adapter.base_model, adapter.system) == (f"{W}/models/base", "Be brief.")
    assert wire.from_struct(adapter.report) == {"tensors": 3}
    base = get(room, "base")
    assert (base.dtype, base.context_length, base.parameter_count, base.source) == ("bfloat16", 512, 7, "a/b")
    assert not base.HasField("certificate") and not base.HasField("report")


def test_models_are_found_by_what_they_are(room: ConversionStub, store: Store) -> None:
    family(store)
    assert listed(room, filter=f'base_model = "{W}/models/base"') == ["adapter"]
    assert listed(room, filter='dtype = "bfloat16" AND source = "a/b"') == ["base"]
    assert listed(room, filter='template = "chatml"', order_by="parameter_count desc") == ["base", "adapter", "merged"]
    assert listed(room, order_by="size_bytes") == ["base", "merged", "adapter"]
    with refused(InvalidArgument, "ORDER_BY_UNKNOWN"):
        listed(room, order_by="template")


def test_what_is_needed_is_not_deleted(room: ConversionStub, store: Store) -> None:
    digests = family(store)
    hold(store, "default.conversionJobs.c.1", f"{W}/conversionJobs/c", [digests["adapter"]])
    needs = {
        "base": {f"{W}/models/adapter", f"{W}/trainingJobs/j", f"{W}/conversionJobs/c"},
        "adapter": {f"{W}/conversionJobs/c"},
        "merged": {f"{W}/endpoints/e"},
    }
    for model, users in needs.items():
        with refused(FailedPrecondition, "MODEL_IN_USE") as error:
            delete(room, model)
        assert {v.field for v in error[0].violations} == users and any(u in error[0].message for u in users)
    release(store, "default.endpoints.e.1")
    release(store, "default.conversionJobs.c.1")
    delete(room, "merged")
    delete(room, "adapter")
    with refused(FailedPrecondition, "MODEL_IN_USE") as error:
        delete(room, "base")
    assert [v.field for v in error[0].violations] == [f"{W}/trainingJobs/j"]
    delete(room, "base", force=True)
    with refused(NotFound, "MODEL_NOT_FOUND"):
        get(room, "base")


def test_a_second_name_of_the_same_is_free(room: ConversionStub, store: Store) -> None:
    """What needs it needs the bytes, and the other name keeps those."""
    family(store)
    put_ref(store, f"{W}/models/copy", {**wire_body(store, "base")})
    delete(room, "copy")
    with refused(FailedPrecondition, "MODEL_IN_USE"):
        delete(room, "base")


def wire_body(store: Store, model: str) -> dict[str, Any]:
    found = store.get(f"refs/{W}/models/{model}.json")
    assert found is not None
    body: dict[str, Any] = json.loads(found.data)
    return body


def test_a_job_that_begins_while_its_model_is_deleted(
    room: ConversionStub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds after the first look and before the name goes; so the name comes back."""
    digest = put_model(store, "wanted")
    before = get(room, "wanted")
    users = Registry.users

    def late(self: Registry, name: str, of: str) -> Any:
        found = users(self, name, of)
        hold(store, "default.trainingJobs.j.1", f"{W}/trainingJobs/j", [digest])
        return found

    monkeypatch.setattr(Registry, "users", late)
    with refused(FailedPrecondition, "MODEL_IN_USE"):
        delete(room, "wanted")
    assert get(room, "wanted") == before


def test_a_job_whose_model_is_deleted_while_it_begins(
    room: ConversionStub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name goes after the job has found it and before it holds: the job is refused, and leaves no hold."""
    family(store)
    take = holding.take

    def slow(*given: Any) -> None:
        store.delete(f"refs/{W}/models/adapter.json")
        take(*given)

    monkeypatch.setattr(holding, "take", slow)
    job = pb.ConversionJob(target_model=f"{W}/models/{fresh('m')}", merge=pb.MergeTask(adapter=f"{W}/models/adapter"))
    with refused(NotFound, "MODEL_NOT_FOUND"):
        room.CreateConversionJob(pb.CreateConversionJobRequest(parent=W, conversion_job=job))
    assert [e.key for e in store.list("holds/")] == ["holds/default.endpoints.e.1.json"]


# ---------------------------------------------------------------------------------------------- lineage


def lineage(room: ConversionStub, name: str, direction: str = "ANCESTORS", depth: int = 0) -> pb.Lineage:
    way = pb.GetLineageRequest.Direction.Value(direction)
    return room.GetLineage(pb.GetLineageRequest(name=name, direction=way, depth=depth))


def test_what_made_a_model(room: ConversionStub, store: Store) -> None:
    digests = family(store)
    found = lineage(room, f"{W}/models/merged")
    assert found.start == digests["merged"] and {n.id for n in found.nodes} == set(digests.values())
    nodes = {n.id: n for n in found.nodes}
    assert nodes[digests["base"]].source == "a/b" and nodes[digests["data"]].kind == "dataset"
    config = nodes[digests["checkpoint"]].config_digest
    assert store.stat_blob(config) is not None
    edges = {(e.child, e.role, e.parent) for e in found.edges}
    assert (digests["adapter"], "checkpoint", digests["checkpoint"]) in edges and len(edges) == 7
    drawn = list(tree(found, descendants=False))
    assert [line.lstrip(" │├└─").split("  ")[0] for line in drawn] == [
        f"{W}/models/merged",
        f"adapter: {W}/models/adapter",
        f"checkpoint: {W}/trainingJobs/j/checkpoints/10",
        f"base: {W}/models/base",
        f"dataset: {W}/datasets/d/revisions/r1",
    ]
    assert "from a/b" in drawn[3] and "config sha256:" in drawn[2]
    assert lineage(room, f"{W}/endpoints/e").nodes[1].id == digests["merged"]
    assert lineage(room, digests["merged"]) == found


def test_what_came_of_a_revision(room: ConversionStub, store: Store) -> None:
    digests = family(store)
    found = lineage(room, f"{W}/datasets/d/revisions/r1", "DESCENDANTS")
    assert {n.id for n in found.nodes} == {*digests.values(), f"{W}/endpoints/e"} - {digests["base"]}
    lines = list(tree(found, descendants=True))
    assert lines[-1].strip(" └─") == f"served: {W}/endpoints/e  endpoint"
    near = lineage(room, f"{W}/datasets/d/revisions/r1", "DESCENDANTS", depth=1)
    assert near.cut and {e.parent for e in near.edges} == {digests["data"]}
    assert not lineage(room, f"{W}/endpoints/e", "DESCENDANTS").edges


def test_what_lost_its_name_is_told_by_digest(room: ConversionStub, store: Store) -> None:
    digests = family(store)
    for ref in ("trainingJobs/j/checkpoints/10", "models/adapter", "datasets/d/revisions/r1"):
        store.delete(f"refs/{W}/{ref}.json")
    for start, way in ((digests["data"], "DESCENDANTS"), (f"{W}/models/merged", "ANCESTORS")):
        nodes = {n.id: n for n in lineage(room, start, way).nodes}
        assert {digests[k] for k in ("merged", "adapter", "checkpoint", "data")} <= set(nodes)
        assert not nodes[digests["adapter"]].names and nodes[digests["adapter"]].kind == "adapter"
    drawn = "\n".join(tree(lineage(room, f"{W}/models/merged"), descendants=False))
    assert f"(was {W}/models/adapter)" in drawn


def test_lineages_that_begin_nowhere(room: ConversionStub, store: Store) -> None:
    for name, reason in {
        f"{W}/models/none": "MODEL_NOT_FOUND",
        f"{W}/datasets/d/revisions/none": "REVISION_NOT_FOUND",
        f"{W}/trainingJobs/j/checkpoints/1": "CHECKPOINT_NOT_FOUND",
        f"{W}/endpoints/none": "ENDPOINT_NOT_FOUND",
        "sha256:" + "0" * 64: "ARTIFACT_NOT_FOUND",
    }.items():
        with refused(NotFound, reason):
            lineage(room, name)
    for name, reason in {
        "none": "NAME_MALFORMED",
        f"{W}/models/Bad": "NAME_MALFORMED",
        "sha256:../x": "DIGEST_MALFORMED",
    }.items():
        with refused(InvalidArgument, reason):
            lineage(room, name)
    put_model(store, "m")
    with refused(InvalidArgument, "DEPTH_INVALID"):
        lineage(room, f"{W}/models/m", depth=-1)


# ---------------------------------------------------------------------------------------------- garbage


def collect(room: ConversionStub, **asked: Any) -> list[pb.CollectGarbageResponse]:
    return list(room.CollectGarbage(pb.CollectGarbageRequest(**asked), timeout=60))


def test_garbage_is_collected(room: ConversionStub, store: Store, home: Path) -> None:
    family(store)
    put_model(store, "brief")
    delete(room, "brief")
    assert collect(room)[-1].young.count == 2
    for path in (home / "store/blobs").rglob("*"):
        os.utime(path, (0, 0))
    looked = collect(room, dry_run=True)
    assert looked[-1].phase == pb.CollectGarbageResponse.DONE
    dropped = collect(room)
    assert dropped[-1] == looked[-1] and dropped[-1].dropped.count == 2 and dropped[-1].live.count == 5
    assert collect(room, grace=Duration(seconds=3600))[-1].dropped.count == 0
    with refused(InvalidArgument, "GRACE_TOO_SHORT"):
        collect(room, grace=Duration(seconds=3599))
