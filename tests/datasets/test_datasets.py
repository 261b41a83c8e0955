from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.finetune.errors import Aborted, AlreadyExists, InvalidArgument, NotFound, Unavailable
from services.finetune.formats import FORMATS
from services.finetune.templates import TEMPLATES
from tests.common.serving import refused
from tests.datasets.conftest import Service
from tests.datasets.wire import commit, new, row


def test_the_same_request_gives_the_first_answer(datasets: DatasetsStub) -> None:
    wanted = pb.CreateDatasetRequest(
        parent="workspaces/one", request_id="7e1", dataset=pb.Dataset(display_name="A", labels={"k": "v"})
    )
    made = datasets.CreateDataset(wanted)
    assert made.display_name == "A" and made.labels["k"] == "v" and made.create_time.seconds and made.etag
    assert datasets.CreateDataset(wanted) == made == datasets.GetDataset(pb.GetDatasetRequest(name=made.name))
    same_id = pb.CreateDatasetRequest(parent="workspaces/one", dataset_id=made.name.split("/")[-1])
    with refused(AlreadyExists, "DATASET_EXISTS"):
        datasets.CreateDataset(same_id)


def test_validate_only_makes_nothing(datasets: DatasetsStub) -> None:
    wanted = pb.CreateDatasetRequest(parent="workspaces/two", dataset_id="a", validate_only=True)
    assert datasets.CreateDataset(wanted).name == "workspaces/two/datasets/a"
    assert not datasets.ListDatasets(pb.ListDatasetsRequest(parent="workspaces/two")).datasets


def test_lists_see_their_workspace_only(datasets: DatasetsStub) -> None:
    for n in range(3):
        labels = {"team": "ab"[n % 2]}
        datasets.CreateDataset(
            pb.CreateDatasetRequest(parent="workspaces/three", dataset_id=f"d{n}", dataset=pb.Dataset(labels=labels))
        )
    first = datasets.ListDatasets(pb.ListDatasetsRequest(parent="workspaces/three", page_size=2, order_by="name desc"))
    assert [d.name[-2:] for d in first.datasets] == ["d2", "d1"] and first.next_page_token
    team = datasets.ListDatasets(pb.ListDatasetsRequest(parent="workspaces/three", filter='labels.team = "a"'))
    assert [d.name[-2:] for d in team.datasets] == ["d0", "d2"]
    with refused(InvalidArgument, "NAME_MALFORMED"):
        datasets.ListDatasets(pb.ListDatasetsRequest(parent="three"))


def test_delete_wants_the_present_etag_and_forgets_revisions(datasets: DatasetsStub) -> None:
    name = new(datasets)
    stale = datasets.GetDataset(pb.GetDatasetRequest(name=name)).etag
    revision = commit(datasets, name, {"a.jsonl": row()})
    with refused(Aborted, "ETAG_MISMATCH"):
        datasets.DeleteDataset(pb.DeleteDatasetRequest(name=name, etag=stale))
    datasets.DeleteDataset(pb.DeleteDatasetRequest(name=name))
    for again in (pb.DeleteDatasetRequest(name=name),):
        with refused(NotFound, "DATASET_NOT_FOUND"):
            datasets.DeleteDataset(again)
    datasets.CreateDataset(pb.CreateDatasetRequest(parent="workspaces/default", dataset_id=name.split("/")[-1]))
    with refused(NotFound, "REVISION_NOT_FOUND"):
        datasets.GetRevision(pb.GetRevisionRequest(name=revision.name))


def test_tables(datasets: DatasetsStub) -> None:
    names = {f.name for f in datasets.ListFormats(pb.ListFormatsRequest()).formats}
    assert names == {*FORMATS, "files"} and len(names) == 30
    templates = {t.name: t.example for t in datasets.ListTemplates(pb.ListTemplatesRequest()).templates}
    assert set(templates) == {*TEMPLATES, "tokenizer"} and len(templates) == 30
    assert "tokenizer" in templates and "<|im_start|>user\nHello<|im_end|>" in templates["internlm2_chat"]


def test_a_store_that_is_gone_is_unavailable(tmp_path: Path) -> None:
    service = Service(tmp_path).start()
    name = new(service.stub)
    shutil.rmtree(tmp_path / "store")
    (tmp_path / "store").write_text("no folder")
    with refused(Unavailable, "STORE_UNREACHABLE"):
        service.stub.GetDataset(pb.GetDatasetRequest(name=name))
    service.stop()


def test_an_s3_store_that_does_not_answer_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    service = Service(tmp_path, "--store-uri", "s3://bucket/q?endpoint=http://127.0.0.1:1").start()
    with refused(Unavailable, "STORE_UNREACHABLE"):
        service.stub.ListDatasets(pb.ListDatasetsRequest(parent="workspaces/default"), timeout=60)
    service.stop()


@pytest.mark.parametrize("module", ["services.datasets.__main__", "services.__main__"])
def test_services_never_import_torch(module: str) -> None:
    heavy = "{'torch', 'transformers', 'pyarrow', 'numpy', 'tokenizers'}"
    script = f"import {module}, sys; print(*({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
