"""What was prepared before a job is what the job trains on."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.stack import Stack
from tests.tiny import tiny_model


def test_training_finds_what_was_prepared(tmp_path: Path, rows: Path) -> None:
    tiny_model(tmp_path / "tiny")
    stack = Stack(tmp_path / "home").start()
    try:
        for words in (
            ["model", "import", str(tmp_path / "tiny"), "--name", "tiny"],
            ["dataset", "create", "d", str(rows)],
        ):
            done = stack.quartet(*words)
            assert done.returncode == 0, done.stderr
        how = ["--model", "tiny", "--max-length", "64", "--system", "Be kind.", "--seed", "3", "--held-out", "0.2"]
        prepared = stack.quartet("dataset", "prepare", "d=2", *how, "--json")
        assert prepared.returncode == 0, prepared.stderr
        counts = json.loads(prepared.stdout)["counts"]
        options = [
            "data.max_length=64",
            "data.weights=[2]",
            "data.system=Be kind.",
            "lora.rank=2",
            "validation.ratio=0.2",
            "schedule.max_steps=2",
        ]
        words = ["train", "smollm2_135m_lora_assistant_e1", "--base", "tiny", "--data", "d", "--seed", "3"]
        trained = stack.quartet(*words, "--cfg-options", *options)
        assert trained.returncode == 0, trained.stderr
        assert f"{counts['block_count']} blocks prepared before: {counts['token_count']} tokens" in trained.stdout
        other = stack.quartet(*words, "--cfg-options", *options, "data.system=Be brief.")
        assert other.returncode == 0 and "prepared before" not in other.stdout
        assert stack.quartet("dataset", "validate", "d", "--model", "tiny").returncode == 0
    finally:
        stack.stop()
