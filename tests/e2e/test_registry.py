"""A model's whole life in the registry, by the command line: made, explained, protected, fetched, forgotten, collected."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from services.client.__main__ import main
from services.finetune.store import open_store
from tests.e2e.stack import Stack
from tests.tiny import tiny_model

TRAIN = ["train", "smollm2_135m_lora_assistant_e1", "--base", "tiny", "--data", "talk", "--name", "j", "--cfg-options",
         "schedule.epochs=1", "report.checkpoint_every=100", "data.max_length=64", "lora.rank=2"]  # fmt: skip


def test_a_models_life(tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stack = Stack(tmp_path / "home").start()

    def run(*words: str, status: int = 0) -> str:
        """The command line in this process: a new one for each would take most of the time."""
        with pytest.raises(SystemExit) as end:
            main([*words, "--endpoint", stack.address])
        out, err = capsys.readouterr()
        assert end.value.code == status, (words, out, err)
        return out if status == 0 else err

    def told(*words: str) -> Any:
        return json.loads(run(*words, "--json").splitlines()[-1])

    try:
        run("model", "import", str(tiny_model(tmp_path / "tiny")), "--name", "tiny")
        run("dataset", "create", "talk", str(rows))
        run(*TRAIN)
        run("convert", "pth_to_hf", "j", "adapter")

        model = told("model", "get", "adapter")
        assert model["certificate"]["template"] == "tokenizer" and model["base_model"].endswith("/tiny")
        assert model["certificate"]["digest"] in run("model", "get", "adapter")
        shown = run("model", "lineage", "adapter")
        assert all(
            part in shown for part in ("models/adapter", "trainingJobs/j/checkpoints/", "datasets/talk/revisions/r")
        )
        (revision,) = (n["names"][0] for n in told("model", "lineage", "adapter")["nodes"] if n["kind"] == "dataset")
        assert "models/adapter" in run("model", "lineage", revision, "--descendants")

        refused = run("model", "delete", "tiny", status=78)
        assert "models/adapter" in refused and "trainingJobs/j" in refused
        run("model", "download", "adapter", str(tmp_path / "out"))
        assert {p.name for p in (tmp_path / "out").iterdir()} >= {"adapter_model.safetensors", "tokenizer.json"}

        run("model", "delete", "adapter")
        base = told("model", "get", "tiny")
        run("model", "delete", "tiny", "--force")  # the job's checkpoint keeps its bytes
        assert told("gc")["young"]["count"] > 0
        for path in (tmp_path / "home/store/blobs").rglob("*"):
            os.utime(path, (0, 0))
        looked = told("gc", "--dry-run")
        assert looked["dropped"]["count"] > 0 and {**told("gc"), "dry_run": True} == looked
        assert "dropped: blobs" in run("gc", "--grace-hours", "1")
        run("gc", "--grace-hours", "0.5", status=65)
        store = open_store((tmp_path / "home/store").as_uri())
        assert all(store.stat_blob(f["digest"]) is not None for f in base["files"])
    finally:
        stack.stop()
