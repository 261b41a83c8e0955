"""Validations over gRPC, with the real worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.finetune.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, QuartetError
from services.finetune.store import Store, open_store
from tests.common.serving import refused
from tests.datasets.conftest import Service
from tests.datasets.test_preparing import put_model
from tests.datasets.wire import commit, new, row

SKIP = pb.CommitRevisionRequest.BAD_ROWS_SKIP
BAD = b'{"messages": [{"role": "user", "content": "hi"}]}\n'


@pytest.fixture(scope="module")
def store(service: Service) -> Store:
    return open_store((service.home / "store").as_uri())


@pytest.fixture(scope="module")
def model(store: Store, tmp_path_factory: pytest.TempPathFactory) -> str:
    return put_model(store, "validate", tmp_path_factory.mktemp("model"))


def validated(datasets: DatasetsStub, revision: str, **given: object) -> pb.Validation:
    """The validation at its end."""
    made = datasets.ValidateRevision(pb.ValidateRevisionRequest(name=revision, **given))  # type: ignore[arg-type]
    events = list(datasets.WatchValidation(pb.WatchValidationRequest(name=made.name), timeout=60))
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    return datasets.GetValidation(pb.GetValidationRequest(name=made.name))


def test_a_whole_validation(datasets: DatasetsStub, model: str) -> None:
    rows = row("q0", "a0") + BAD * 120 + row("q0", "a0") + row("x<|im_end|>", "y" * 60)
    parent = new(datasets)
    revision = commit(datasets, parent, {"a.jsonl": rows}, bad_rows=SKIP).name
    done = validated(datasets, f"{parent}/revisions/latest", model=model, max_length=64)
    assert (done.state, done.revision, done.attempt) == (pb.SUCCEEDED, revision, 1)
    assert done.progress.done_rows == done.progress.total_rows == 123
    report = done.report
    assert (report.row_count, report.bad_row_count, dict(report.causes)) == (3, 120, {"ANSWER_MISSING": 120})
    assert len(report.problems) == 100
    assert (report.problems[0].file, report.problems[0].row) == ("a.jsonl", 2)
    assert (report.exact_duplicate_count, report.duplicates[0].first_row) == (1, 1)
    assert (report.tokens.template, report.tokens.truncated_row_count) == ("tokenizer", 1)
    assert report.tokens.special_row_count == 1 and "<|im_end|>" in report.tokens.special_rows[0].message
    assert sum(b.row_count for b in report.tokens.lengths) == 3
    plain = validated(datasets, revision, validation_id="plain")
    assert not plain.report.HasField("tokens") and plain.name.endswith("/validations/plain")
    listed = datasets.ListValidations(pb.ListValidationsRequest(parent="workspaces/default", page_size=1))
    assert [v.name for v in listed.validations] == [plain.name] and not listed.validations[0].HasField("report")
    with refused(AlreadyExists, "JOB_EXISTS"):
        datasets.ValidateRevision(pb.ValidateRevisionRequest(name=revision, validation_id="plain"))
    datasets.DeleteValidation(pb.DeleteValidationRequest(name=plain.name))
    with refused(NotFound, "JOB_NOT_FOUND"):
        datasets.GetValidation(pb.GetValidationRequest(name=plain.name))


def test_the_same_request_is_the_same_validation(datasets: DatasetsStub) -> None:
    revision = commit(datasets, new(datasets), {"a.jsonl": row()}).name
    wanted = pb.ValidateRevisionRequest(name=revision, request_id="v1")
    made = datasets.ValidateRevision(wanted)
    assert datasets.ValidateRevision(wanted).name == made.name
    cancelled = datasets.CancelValidation(pb.CancelValidationRequest(name=made.name))
    assert cancelled.name == made.name
    last = list(datasets.WatchValidation(pb.WatchValidationRequest(name=made.name), timeout=60))[-1]
    assert last.state.state in (pb.CANCELLED, pb.SUCCEEDED)


def test_what_is_refused(datasets: DatasetsStub, store: Store, model: str, tmp_path: Path) -> None:
    revision = commit(datasets, new(datasets), {"a.jsonl": row()}).name
    files = commit(datasets, new(datasets), {"config.json": b"{}"}, format="files").name
    plain = put_model(store, "bare", tmp_path, template="")
    wrong: list[tuple[type[QuartetError], str, dict[str, Any]]] = [
        (NotFound, "REVISION_NOT_FOUND", {"name": revision + "0"}),
        (NotFound, "MODEL_NOT_FOUND", {"model": model + "x"}),
        (InvalidArgument, "DATASET_EMPTY", {"name": files}),
        (InvalidArgument, "TEMPLATE_UNKNOWN", {"model": model, "template": "vicunia"}),
        (InvalidArgument, "MAX_LENGTH_INVALID", {"max_length": -1}),
        (InvalidArgument, "NAME_MALFORMED", {"validation_id": "A b"}),
        (FailedPrecondition, "TEMPLATE_MISSING", {"model": plain}),
    ]
    for cls, reason, given in wrong:
        with refused(cls, reason):
            datasets.ValidateRevision(pb.ValidateRevisionRequest(**{"name": revision, **given}))
