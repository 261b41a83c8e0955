"""Runs over rows with images: exact to resume, looked at, asked about pictures; and where pixels and features come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.finetune.config import RunConfig, override
from services.finetune.errors import InvalidArgument, NotFound
from services.finetune.orders import ArtifactRef
from services.finetune.store import Store
from services.finetune.store.artifacts import load, publish, publish_directory
from services.finetune.train.answers import shown
from services.finetune.train.images import AHEAD, Kept, Reader
from services.finetune.vision import ImageForm, pixels, read_form
from tests.finetune.train.conftest import META, Bench
from tests.finetune.train.llava import picture, rows_with_images, tiny_llava

TOWER: dict[str, Any] = {
    "lora__targets": ["all-linear", "model.vision_tower.*"],
    "lora__rank_pattern": {"model.vision_tower.*": 2},
    "lora__modules_to_save": ["multi_modal_projector"],
    "optim__lr_pattern": {"vision_tower": 1e-3},
}
PROJECTOR: dict[str, Any] = {"lora__targets": [], "lora__modules_to_save": ["multi_modal_projector"], "optim__lr": 2e-3}
LOOKS: dict[str, Any] = {
    "data__max_length": 128,
    "lora__dropout": 0.1,
    "validation__ratio": 0.25,
    "validation__every": 2,
    "report__prompts": ["say 1", "say it"],
    "report__images": ["1.png", ""],
    "report__sample_tokens": 3,
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava") / "tiny", hidden=64)


@pytest.fixture
def seeing(bench: Bench, llava: Path) -> Bench:
    bench.model, bench.base = llava, publish_directory(bench.store, "base", llava, meta=META)
    bench.data = rows_with_images(bench.store)
    return bench


@pytest.mark.parametrize("way", [TOWER, PROJECTOR, {**TOWER, "method": "qlora", "quant__bits": 4}])
def test_a_run_with_images_learns_and_goes_on_bit_for_bit(seeing: Bench, way: dict[str, Any]) -> None:
    way = {**LOOKS, **way}
    ran = seeing.train(**way)
    # A step of rows without an image has a loss that a projector alone cannot change; adapters soon know few rows by heart.
    told = ran.losses if way["lora__targets"] else ran.looks
    assert told[-1] < told[0] and len(ran.answers) == 2, ran.losses
    resumed = seeing.train(resume=ran.checkpoints[2], **way)
    assert (resumed.losses, resumed.looks, resumed.answers) == (ran.losses[2:], ran.looks, ran.answers)
    assert seeing.files(resumed.last) == seeing.files(ran.last)


def test_it_is_the_images_that_are_learned_from(seeing: Bench) -> None:
    way = {**LOOKS, **PROJECTOR, "validation__ratio": 0.0, "schedule__max_steps": 1}
    before = seeing.train(**way)
    manifest = load(seeing.store, seeing.data)
    files = {f.path: f for f in manifest.files}
    swapped = {**files, "0.png": replace(files["4.png"], path="0.png"), "4.png": replace(files["0.png"], path="4.png")}
    seeing.data = publish(seeing.store, replace(manifest, files=tuple(swapped.values())))
    assert seeing.train(**way).losses != before.losses


def test_what_cannot_be_shown_is_named(seeing: Bench, form: ImageForm, tmp_path: Path) -> None:
    config = override(RunConfig(), {"report.prompts": ["a", "b"], "report.images": ["1.pgn"]})
    data = (ArtifactRef(name="d", digest=seeing.data),)
    with pytest.raises(InvalidArgument, match=r"report.images.*'1.pgn'.*'1.png'"):
        shown(config, data, seeing.store, form, tmp_path)
    config = override(config, {"report.images": ["1.png"]})
    with pytest.raises(InvalidArgument, match=r"report.images.*sees no images"):
        shown(config, data, seeing.store, None, tmp_path)
    one, two = shown(config, data, seeing.store, form, tmp_path)
    assert one.shape == (1, 3, form.size, form.size) and torch.equal(one, two)


@pytest.fixture
def form(llava: Path) -> ImageForm:
    found = read_form(llava)
    assert found is not None
    return found


class Counting:
    """A store that tells which blobs were fetched."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fetched: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def fetch_blob(self, digest: str, path: Path) -> None:
        self.fetched.append(digest)
        self.store.fetch_blob(digest, path)


def test_images_are_decoded_ahead_in_order_and_only_so_many(file_store: Store, tmp_path: Path, form: ImageForm) -> None:
    digests = [file_store.put_blob(picture(n)).digest for n in range(8)]
    drawn: list[str] = []

    def coming() -> Iterator[str]:
        for n in range(10 * AHEAD):
            drawn.append(digests[n % 8])
            yield drawn[-1]

    store: Any = Counting(file_store)
    reader = Reader(store, form, tmp_path / "files", 2, 1 << 20)
    reader.expect(coming())
    assert len(drawn) == AHEAD
    for at in range(0, 4 * AHEAD, 3):
        wanted = [digests[n % 8] for n in range(at, at + 3)]
        found = reader.read(wanted)
        for digest, seen in zip(wanted, found, strict=True):
            (tmp_path / "one.png").write_bytes(picture(digests.index(digest)))
            assert np.array_equal(seen, pixels(tmp_path / "one.png", form))
        assert len(drawn) == at + 3 + AHEAD
    assert sorted(store.fetched) == sorted(digests), "each file is fetched once"
    # What nobody expected is read all the same, and a gap does not hold up what follows.
    (other,) = reader.read([file_store.put_blob(picture(100)).digest])
    assert other.shape == (3, form.size, form.size)
    before = len(drawn)
    reader.read([drawn[-2]])
    assert len(drawn) > before
    reader.close()


def test_without_room_files_are_not_kept(file_store: Store, tmp_path: Path, form: ImageForm) -> None:
    reader = Reader(file_store, form, tmp_path / "files", 1, 0)
    digest = file_store.put_blob(picture(1)).digest
    (tmp_path / "one.png").write_bytes(picture(1))
    assert np.array_equal(reader.read([digest])[0], pixels(tmp_path / "one.png", form))
    assert not (tmp_path / "files").exists()
    with pytest.raises(NotFound):
        reader.read(["sha256:" + "0" * 64])
    reader.close()


def test_features_come_back_as_they_were_and_keep_within_their_room(tmp_path: Path) -> None:
    values = torch.randn(5, 4, 3).bfloat16()
    kept = Kept(tmp_path / "features.bin", 3 * values[0].nbytes)
    kept.put(["a", "b"], values[:2])
    kept.put(["b", "c", "d"], values[1:4])
    kept.put(["e"], values[4:])
    kept._writer.submit(int).result()  # all before it is written
    assert [d in kept for d in "abcde"] == [True, True, True, False, False]
    assert torch.equal(kept.get(["c", "a", "b"]), values[[2, 0, 1]])
    assert (tmp_path / "features.bin").stat().st_size == 3 * values[0].nbytes
    kept.close()
