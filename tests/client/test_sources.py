"""What a config names on this machine: which files are taken, and which never are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.client.configs import flat, read_deepspeed
from services.client.sources import images_of, local_base, local_rows, of_split
from services.finetune.config import RunConfig, override
from services.finetune.errors import InvalidArgument, NotFound


def config(**source: Any) -> RunConfig:
    return override(RunConfig(), {"data.sources": [source]})


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["openassistant_best_replies_train.jsonl", "openassistant_best_replies_eval.jsonl"], [0]),
        (["a.jsonl", "b.json", "README.md", "c.PARQUET"], [0, 1, 3]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"], [0, 1]),
        (["training.csv", "dev.csv"], [0]),
        (["rows.jsonl", "validation.jsonl"], [0]),
        (["trained-models.jsonl", "attestation.jsonl"], [0, 1]),
    ],
)
def test_a_folders_rows_are_those_of_the_split(tmp_path: Path, names: list[str], chosen: list[int]) -> None:
    touch(tmp_path, *names)
    assert of_split(tmp_path, "train") == sorted(tmp_path / names[n] for n in chosen)


def test_another_split_must_be_named_by_a_file(tmp_path: Path) -> None:
    touch(tmp_path, "train.jsonl", "valid.jsonl")
    assert of_split(tmp_path, "validation") == [tmp_path / "valid.jsonl"]
    with pytest.raises(NotFound, match="no rows of the split test"):
        of_split(tmp_path, "test")


def test_only_files_of_rows_leave_this_machine(tmp_path: Path) -> None:
    touch(tmp_path, "id_rsa", "rows.jsonl")
    ((_, files),) = local_rows(config(files=[str(tmp_path / "rows.jsonl")]))
    assert files == [tmp_path / "rows.jsonl"]
    with pytest.raises(InvalidArgument, match="id_rsa is no file of rows"):
        local_rows(config(files=[str(tmp_path / "id_rsa")]))
    with pytest.raises(NotFound, match="is not here; give --data"):
        local_rows(config(files=[str(tmp_path / "none.jsonl")]))


def test_only_images_that_rows_name_leave_their_folder(tmp_path: Path) -> None:
    touch(tmp_path, "images/coco/1.jpg", "images/2.PNG", "images/3.jpg", "images/id_rsa", "secret.jpg", "rows.jsonl")
    (tmp_path / "images/link.jpg").symlink_to(tmp_path / "secret.jpg")
    named = ["coco/1.jpg", "./2.PNG", "id_rsa", "../secret.jpg", "link.jpg", "gone.jpg", "https://a/3.jpg"]
    rows = [{"image": name} for name in named] + [{"images": ["coco/1.jpg"]}, {}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    ((source, files),) = local_rows(config(files=[str(tmp_path / "rows.jsonl")], images=str(tmp_path / "images")))
    sent = {"coco/1.jpg": tmp_path / "images/coco/1.jpg", "2.PNG": tmp_path / "images/2.PNG"}
    assert dict(images_of(source, files)) == sent
    assert images_of(replace(source, images=""), files) == []


def test_a_hubs_id_may_be_a_folder_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InvalidArgument, match="quartet dataset create rows FILES --format alpaca`, and give --data rows"
    ):
        local_rows(config(hub_id="me/rows", format="alpaca"))
    touch(tmp_path, "me/rows/data/a.jsonl", "me/model/config.json")
    ((_, files),) = local_rows(config(hub_id="me/rows", folder="data"))
    assert [f.as_posix() for f in files] == ["me/rows/data/a.jsonl"]
    assert local_base(override(RunConfig(), {"model.checkpoint": "me/model"})) == Path("me/model")
    assert local_base(override(RunConfig(), {"model.checkpoint": "you/model"})) is None
    with pytest.raises(NotFound, match="give --base"):
        local_base(override(RunConfig(), {"model.checkpoint": "./model"}))


def test_without_any_data_it_is_asked_for() -> None:
    with pytest.raises(InvalidArgument, match="give --data"):
        local_rows(RunConfig())


def test_a_flat_config_is_whole() -> None:
    assert override(RunConfig(), flat(config(files=["a.jsonl"]))) == config(files=["a.jsonl"])


def test_deepspeed_by_name_or_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}')
    assert (read_deepspeed("deepspeed_zero3"), read_deepspeed(str(path))) == (
        "deepspeed_zero3",
        "deepspeed_zero2_offload",
    )
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(InvalidArgument):
            read_deepspeed(str(path))
    with pytest.raises(InvalidArgument, match="presets are deepspeed_zero1"):
        read_deepspeed("zero2")
    with pytest.raises(NotFound):
        read_deepspeed(str(tmp_path / "none.json"))
