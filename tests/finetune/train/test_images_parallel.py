"""Two processes train on rows with images as one does, where in some micro-steps a rank has none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.finetune.config import RunConfig, override, to_json
from services.finetune.orders import ArtifactRef, TrainRun
from services.finetune.store import open_store
from services.finetune.store.artifacts import publish_directory
from services.finetune.train.parallel import ALONE
from tests.finetune.train import test_parallel
from tests.finetune.train.llava import rows_with_images, tiny_llava
from tests.finetune.train.test_parallel import META, PLAIN, losses, norms, together
from tests.finetune.train.together import go

SEEING: dict[str, Any] = {
    **PLAIN,
    "lora.targets": ["all-linear", "model.vision_tower.*"],
    "lora.modules_to_save": ["multi_modal_projector"],
    "data.pack": False,  # a row a block: some have no image
    "data.max_length": 128,
    "schedule.max_steps": 4,
    "report.images": ["1.png"],
}
PROJECTOR = {"lora.targets": [], "lora.loraplus_lr_ratio": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "copies": {},
    "zero2": {"parallel.deepspeed": "deepspeed_zero2"},
    "zero3": {"parallel.deepspeed": "deepspeed_zero3"},
    "projector_zero2": {**PROJECTOR, "parallel.deepspeed": "deepspeed_zero2"},
    "projector_zero3": {**PROJECTOR, "parallel.deepspeed": "deepspeed_zero3"},
}


@pytest.mark.parametrize(
    "ways", [["zero3", "projector_zero2"], pytest.param(["copies", "zero2", "projector_zero3"], marks=pytest.mark.slow)]
)
def test_two_processes_see_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: list[str]) -> None:
    store = open_store((tmp_path / "store").as_uri())
    run = TrainRun(
        job="workspaces/default/trainingJobs/t",
        config=override(RunConfig(), SEEING),
        base=ArtifactRef(
            name="base", digest=publish_directory(store, "base", tiny_llava(tmp_path / "tiny"), meta=META)
        ),
        datasets=(ArtifactRef(name="rows", digest=rows_with_images(store)),),
    )
    monkeypatch.setattr(test_parallel, "WAYS", {name: (way, None) for name, way in WAYS.items()})
    told = together(run, tmp_path, ways)
    alone = {
        name: go(
            store, f"alone-{name}", to_json(replace(run, config=override(run.config, way))), ALONE, tmp_path / name
        )
        for name, way in {"all": {}, "projector": PROJECTOR}.items()
    }
    for way in ways:
        one = alone["projector" if way.startswith("projector") else "all"]
        assert losses(told[way]) == pytest.approx(losses(one), abs=1e-3), way
        assert norms(told[way]) == pytest.approx(norms(one), rel=1e-2), way
        assert [e["answer"] for e in told[way] if e["type"] == "sample"] == [
            e["answer"] for e in one if e["type"] == "sample"
        ]
