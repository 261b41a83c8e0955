"""Where `model import PATH` has a model read: by the service itself, or brought to it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from quartet.conversion.v1 import conversion_pb2

from services.client.commands.models import start_import
from services.finetune.errors import NotFound, PermissionDenied, QuartetError

FORBIDDEN = PermissionDenied("not from there", reason="LOCAL_PATH_FORBIDDEN")
ABSENT = NotFound("not on my machine", reason="MODEL_NOT_FOUND")


class Asked:
    """A client that notes what it is asked; a service that answers each local path with `answer`."""

    def __init__(self, local: bool, answer: QuartetError | None) -> None:
        self.local, self.answer, self.said = local, answer, list[str]()

    def is_local(self, room: str) -> bool:
        return self.local

    def convert(self, target: str, import_model: conversion_pb2.ImportTask) -> Any:
        source = import_model.WhichOneof("source")
        self.said.append(str(source))
        if source == "local_path" and self.answer is not None:
            raise self.answer
        return SimpleNamespace(name="job")

    def upload_dataset(self, dataset: str, files: Any, *rest: Any) -> Any:
        self.said.append(f"upload {len(files)} to {dataset}")
        return SimpleNamespace(name="revision")


BROUGHT = ["upload 1 to import-m", "revision"]


@pytest.mark.parametrize(
    ("here", "local", "answer", "said"),
    [
        (True, True, None, ["local_path"]),
        (True, True, FORBIDDEN, ["local_path", *BROUGHT]),
        (True, True, ABSENT, ["local_path", *BROUGHT]),  # a tunnel to another machine looks local
        (True, False, None, BROUGHT),
        (False, False, None, ["local_path"]),
        (False, True, None, ["local_path"]),
    ],
)
def test_a_path(tmp_path: Path, here: bool, local: bool, answer: QuartetError | None, said: list[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    client: Any = Asked(local, answer)
    path = tmp_path / ("model" if here else "elsewhere")
    start_import(client, str(path), "m", conversion_pb2.ImportTask(), lambda done, total: None)
    assert client.said == said


@pytest.mark.parametrize("answer", [FORBIDDEN, ABSENT])
def test_a_path_that_is_nowhere(tmp_path: Path, answer: QuartetError) -> None:
    client: Any = Asked(False, answer)
    with pytest.raises(NotFound, match=f"no file or folder here, and the service says: {answer.message}") as error:
        start_import(client, str(tmp_path / "x"), "m", conversion_pb2.ImportTask(), lambda done, total: None)
    assert error.value.reason == "MODEL_UNKNOWN"


def test_a_hub_id_and_a_slip_of_the_pen() -> None:
    client: Any = Asked(False, None)
    start_import(client, "me/model", "m", conversion_pb2.ImportTask(), lambda done, total: None)
    assert client.said == ["hub_id"]
    for slip in ("model", "./me/model", "a/b/c", "me/model.gguf"):
        with pytest.raises(NotFound, match="hub id is OWNER/NAME"):
            start_import(client, slip, "m", conversion_pb2.ImportTask(), lambda done, total: None)
