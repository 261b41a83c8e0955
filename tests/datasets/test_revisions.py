from __future__ import annotations

import json
from pathlib import Path

import pytest
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.common.status import STATUS_METADATA, from_rpc_error
from services.finetune.errors import FailedPrecondition, InvalidArgument, NotFound, OutOfRange
from services.finetune.store import artifacts, open_store
from tests.common.serving import refused
from tests.datasets.conftest import Service
from tests.datasets.wire import commit, new, row, sha256, upload
from tests.tiny import tiny_sight, tiny_tokenizer

SKIP = pb.CommitRevisionRequest.BAD_ROWS_SKIP
BAD = b'{"messages": [{"role": "user", "content": "hi"}]}\n'


def test_equal_content_is_the_equal_revision(datasets: DatasetsStub, service: Service) -> None:
    parent, files = new(datasets), {"b.jsonl": row() * 3, "a/c.jsonl": row("x")}
    made = commit(datasets, parent, files)
    assert (made.row_count, made.format, made.skipped_row_count) == (4, "openai", 0)
    assert [f.path for f in made.files] == ["b.jsonl", "a/c.jsonl"]
    assert made.name == f"{parent}/revisions/r{made.digest.removeprefix('sha256:')[:12]}"
    assert commit(datasets, parent, files, format="openai") == made
    latest = datasets.GetRevision(pb.GetRevisionRequest(name=f"{parent}/revisions/latest"))
    assert latest == made
    manifest = artifacts.load(open_store((service.home / "store").as_uri()), made.digest)
    assert manifest.kind == "dataset" and manifest.meta["rows"] == 4 and manifest.size == made.size_bytes


def test_latest_is_the_newest(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    first = commit(datasets, parent, {"a.jsonl": row("1")})
    second = commit(datasets, parent, {"a.jsonl": row("2")})
    commit(datasets, parent, {"a.jsonl": row("1")})
    assert datasets.GetDataset(pb.GetDatasetRequest(name=parent)).latest_revision == second.name
    listed = datasets.ListRevisions(pb.ListRevisionsRequest(parent=parent, page_size=1))
    assert list(listed.revisions) == [first]
    rest = datasets.ListRevisions(pb.ListRevisionsRequest(parent=parent, page_token=listed.next_page_token))
    assert list(rest.revisions) == [second]
    wanted = pb.ListRevisionsRequest(parent=parent, filter='format = "alpaca"')
    assert not datasets.ListRevisions(wanted).revisions


def test_bad_rows_are_blamed(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    data = row() + b'{"messages": [\n' + row() + BAD * 150 + b'{"messages": "\xe9"}\n'
    digest = upload(datasets, parent, data)
    wanted = pb.CommitRevisionRequest(parent=parent, files=[pb.RevisionFile(path="a.jsonl", digest=digest)])
    with refused(InvalidArgument, "ROWS_INVALID") as errors:
        datasets.CommitRevision(wanted, metadata=STATUS_METADATA)
    assert errors[0].metadata["bad_rows"] == "152"
    assert len(errors[0].violations) == 100
    assert errors[0].violations[0].field == "files[a.jsonl].rows[2]"
    assert errors[0].violations[1].field.startswith("files[a.jsonl].rows[4].messages")
    assert not datasets.GetDataset(pb.GetDatasetRequest(name=parent)).latest_revision


def test_a_foreign_client_gets_as_many_as_its_channel_takes(service: Service) -> None:
    import grpc
    from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub as Stub

    with grpc.insecure_channel(service.address) as channel:
        for _ in range(10):  # gRPC refuses large trailers at random
            with pytest.raises(grpc.RpcError) as caught:
                commit(Stub(channel), new(service.stub), {"a.jsonl": row() + BAD * 150})
            error = from_rpc_error(caught.value)
            assert error.reason == "ROWS_INVALID" and error.metadata["bad_rows"] == "150"
            assert len(error.violations) + int(error.metadata["violations_left_out"]) == 100


def test_bad_rows_can_be_left_out(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    made = commit(datasets, parent, {"a.jsonl": row() + BAD * 120 + row()}, bad_rows=SKIP)
    assert (made.row_count, made.skipped_row_count, len(made.skipped_rows)) == (2, 120, 100)
    assert (made.skipped_rows[0].file, made.skipped_rows[0].row) == ("a.jsonl", 2)
    assert made.skipped_rows[0].reason == "ANSWER_MISSING"
    with refused(InvalidArgument, "ROWS_INVALID"):
        commit(datasets, parent, {"a.jsonl": BAD}, bad_rows=SKIP)


@pytest.mark.parametrize(
    ("files", "format", "reason"),
    [
        ({}, "", "DATASET_EMPTY"),
        ({"a.jsonl": b""}, "", "DATASET_EMPTY"),
        ({"a.jsonl": b"\n\n"}, "openai", "DATASET_EMPTY"),
        ({"a.jsonl": b'{"foo": 1}\n'}, "", "FORMAT_UNDETECTED"),
        ({"a.bin": row()}, "", "FORMAT_UNDETECTED"),
        ({"a.jsonl": row()}, "openia", "FORMAT_UNKNOWN"),
        ({"../a.jsonl": row()}, "", "PATH_UNSAFE"),
        ({"/a.jsonl": row()}, "", "PATH_UNSAFE"),
        ({"a.jsonl": row(), "a.jsonl/b.jsonl": row()}, "", "PATH_UNSAFE"),
    ],
)
def test_what_cannot_be_a_revision(datasets: DatasetsStub, files: dict[str, bytes], format: str, reason: str) -> None:
    with refused(InvalidArgument, reason):
        commit(datasets, new(datasets), files, format=format)


def test_files_must_be_there(datasets: DatasetsStub) -> None:
    parent, missing = new(datasets), sha256(b"never sent")
    files = [pb.RevisionFile(path="a.jsonl", digest=missing)]
    with refused(FailedPrecondition, "BLOB_MISSING") as errors:
        datasets.CommitRevision(pb.CommitRevisionRequest(parent=parent, files=files))
    assert errors[0].violations[0].field == "files[a.jsonl].digest"
    with refused(NotFound, "REVISION_NOT_FOUND"):
        datasets.GetRevision(pb.GetRevisionRequest(name=f"{parent}/revisions/latest"))
    twice = [pb.RevisionFile(path="a.jsonl", digest=upload(datasets, parent, row()))] * 2
    with refused(InvalidArgument, "PATH_UNSAFE"):
        datasets.CommitRevision(pb.CommitRevisionRequest(parent=parent, files=twice))


def test_validate_only_changes_nothing(datasets: DatasetsStub) -> None:
    parent = new(datasets)
    checked = commit(datasets, parent, {"a.jsonl": row() * 2}, validate_only=True)
    assert checked.row_count == 2 and not checked.name
    assert not datasets.ListRevisions(pb.ListRevisionsRequest(parent=parent)).revisions


def test_a_models_files_are_kept_unread(datasets: DatasetsStub) -> None:
    files = {"config.json": b"{}", "model.safetensors": bytes(100)}
    made = commit(datasets, new(datasets), files, format="files")
    assert (made.format, made.row_count, made.size_bytes) == ("files", 0, 102)


def test_preview_shows_where_images_stand(datasets: DatasetsStub, service: Service, tmp_path: Path) -> None:
    store = open_store((service.home / "store").as_uri())
    digest = artifacts.publish_directory(store, "base", tiny_tokenizer(tmp_path), meta={"template": "tokenizer"})
    artifacts.put_ref(store, "workspaces/default/models/seeing", {"digest": digest, "kind": "base"})
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    data = json.dumps({"image": "a.jpg", "conversations": turns}).encode()
    made = commit(datasets, new(datasets), {"a.jsonl": data, "a.jpg": b"kept as it is"})
    assert (made.format, made.format_reason) == ("llava", "the first row has conversations and image")
    wanted = pb.PreviewRowsRequest(name=made.name, model="workspaces/default/models/seeing", max_length=50)
    (shown,) = datasets.PreviewRows(wanted).rows
    assert list(shown.token_ids).count(-200) == 1 and "".join(p.text for p in shown.pieces).count("q") == 1
    digest = artifacts.publish_directory(store, "base", tiny_sight(tmp_path / "s"), meta={"template": "tokenizer"})
    artifacts.put_ref(store, "workspaces/default/models/sighted", {"digest": digest, "kind": "base"})
    wanted.model = "workspaces/default/models/sighted"
    (whole,) = datasets.PreviewRows(wanted).rows
    assert list(whole.token_ids).count(259) == 4 and not whole.truncated_tokens
    wanted.max_length = list(whole.token_ids).index(259) + 3
    (torn,) = datasets.PreviewRows(wanted).rows
    assert 259 not in torn.token_ids and len(torn.token_ids) == wanted.max_length - 3


def test_the_tutorials_spelling_of_turns_is_taken_with_a_warning(datasets: DatasetsStub) -> None:
    turns = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    data = json.dumps({"id": "1", "image": "a.jpg", "conversation": turns}).encode()
    made = commit(datasets, new(datasets), {"a.jsonl": data, "a.jpg": b"kept as it is"})
    assert (made.format, made.row_count) == ("llava", 1)
    assert made.format_reason.endswith("; warning: in 1 rows `conversation` is read as `conversations`")


def test_preview_shows_what_training_sees(datasets: DatasetsStub, service: Service, tmp_path: Path) -> None:
    store = open_store((service.home / "store").as_uri())
    model = "workspaces/default/models/tiny"
    digest = artifacts.publish_directory(store, "base", tiny_tokenizer(tmp_path), meta={"template": "tokenizer"})
    artifacts.put_ref(store, model, {"digest": digest, "kind": "base"})
    parent = new(datasets)
    made = commit(datasets, parent, {"a.jsonl": row("q0", "a0") + BAD + row("q1", "ä€1")}, bad_rows=SKIP)

    def preview(**given: object) -> pb.PreviewRowsResponse:
        wanted = pb.PreviewRowsRequest(name=made.name, model=model, **given)  # type: ignore[arg-type]
        return datasets.PreviewRows(wanted)

    both = preview().rows
    assert [r.row for r in both] == [1, 3]
    one = preview(start_row=1, row_count=1).rows[0]
    assert one == both[1]
    learned = "".join(p.text for p in one.pieces if p.trained)
    assert learned.startswith("ä€1<|im_end|>") and "q1" not in learned
    assert sum(one.loss_mask) == len("ä€1".encode()) + 1 == 7
    assert len(one.token_ids) == len(one.loss_mask)
    cut = preview(start_row=1, max_length=len(one.token_ids) - 4).rows[0]
    assert cut.truncated_tokens == 4 and list(cut.token_ids) == list(one.token_ids)[:-4]
    assert preview(template="vicuna").template == "vicuna"
    for start in (-1, 2):
        with refused(OutOfRange, "ROW_OUT_OF_RANGE"):
            preview(start_row=start)
    with refused(InvalidArgument, "TEMPLATE_UNKNOWN"):
        preview(template="vicunia")
    with refused(NotFound, "MODEL_NOT_FOUND"):
        datasets.PreviewRows(pb.PreviewRowsRequest(name=made.name, model=model + "x"))


def test_columns_stand_for_fields_in_every_reading(datasets: DatasetsStub, service: Service, tmp_path: Path) -> None:
    store = open_store((service.home / "store").as_uri())
    digest = artifacts.publish_directory(store, "base", tiny_tokenizer(tmp_path), meta={"template": "tokenizer"})
    artifacts.put_ref(store, "workspaces/default/models/mapped", {"digest": digest, "kind": "base"})
    rows = b"".join(json.dumps({"ask": f"q{n}", "say": f"a{n}", "id": n}).encode() + b"\n" for n in range(3))
    name = new(datasets)
    with refused(InvalidArgument, "FORMAT_UNDETECTED"):
        commit(datasets, name, {"a.jsonl": rows})
    mapping = {"instruction": "ask", "output": "say"}
    made = commit(datasets, name, {"a.jsonl": rows}, columns=mapping)
    assert (made.format, made.row_count, dict(made.columns)) == ("alpaca", 3, mapping)
    assert made == datasets.GetRevision(pb.GetRevisionRequest(name=made.name))
    wanted = pb.PreviewRowsRequest(name=made.name, model="workspaces/default/models/mapped", row_count=1)
    (shown,) = datasets.PreviewRows(wanted).rows
    assert [p.text.count("q0") + p.text.count("a0") for p in shown.pieces if p.trained] == [1]
    with refused(InvalidArgument, "ROWS_INVALID") as error:
        commit(datasets, name, {"a.jsonl": rows}, format="alpaca", columns={"instruction": "asks", "output": "say"})
    assert error[0].violations[0].reason == "COLUMN_MISSING" and "did you mean 'ask'" in error[0].violations[0].message
    with refused(InvalidArgument, "COLUMN_UNKNOWN"):
        commit(datasets, name, {"a.jsonl": rows}, format="alpaca", columns={"instructions": "ask"})
