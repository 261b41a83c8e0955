"""A model trained whole: what it learned it says, once conversion has made a model of the checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.stack import Stack
from tests.tiny import tiny_model

ANSWER = "it is blue"


def test_a_model_trained_whole_is_converted_served_and_says_what_it_learned(tmp_path: Path) -> None:
    tiny_model(tmp_path / "tiny")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "sky?", "output": ANSWER}) + "\n")
    # Threads of a tiny model wait for each other longer than they work.
    stack = Stack(tmp_path / "home", env={"OMP_NUM_THREADS": "1"}).start()
    options = {
        "method": "full",
        "model.dtype": "float32",
        "data.max_length": 64,
        "schedule.accumulate": 1,
        "schedule.max_steps": 40,
        "schedule.kind": "constant_with_warmup",
        "optim.name": "adamw_8bit",
        "optim.lr": 1e-2,
        "report.prompts": "[]",
    }
    given = [f"{key}={value}" for key, value in options.items()]
    try:
        for words in (
            ["model", "import", str(tmp_path / "tiny"), "--name", "tiny"],
            ["dataset", "create", "d", str(rows)],
            ["train", "smollm2_135m_lora_assistant_e1", "--base", "tiny", "--data", "d", "--name", "job",
             "--cfg-options", *given],
            ["convert", "pth_to_hf", "job", "tuned", "--max-shard-size", "64KB"],
        ):  # fmt: skip
            done = stack.quartet(*words)
            assert done.returncode == 0, done.stderr + done.stdout
        model = json.loads(stack.quartet("model", "get", "tuned", "--json").stdout)
        assert model["kind"] == "MERGED"
        assert len([f for f in model["files"] if f["path"].endswith(".safetensors")]) > 1
        said = stack.quartet("chat", "tuned", "-m", "sky?", "--temperature", "0", "--max-new-tokens", "16")
        assert said.returncode == 0, said.stderr
        assert said.stdout.strip() == ANSWER
    finally:
        stack.stop()
