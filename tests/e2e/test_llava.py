"""A model that sees, from its parts to its answers: assembled, trained on images, converted, served, asked."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from tests.e2e.stack import Stack
from tests.finetune.convert import towers
from tests.tiny import tiny_model

SEEN = {"red": "it is red", "blue": "it is blue"}


def taught(stack: Stack, folder: Path) -> Path:
    """Serve a tiny model as `e` that knows SEEN; the folder of <colour>.png."""
    tiny_model(folder / "tiny")
    towers.clip(folder / "clip")
    data = folder / "data"
    (data / "images").mkdir(parents=True)
    rows = []
    for colour, answer in SEEN.items():
        Image.new("RGB", (40, 30), colour).save(data / "images" / f"{colour}.png")
        said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": colour, "image": f"images/{colour}.png", "conversations": said})
    (data / "rows.json").write_text(json.dumps(rows))
    options = {
        "method": "full",
        "model.dtype": "float32",
        "model.freeze": '["model.vision_tower"]',
        "data.max_length": 64,
        "schedule.accumulate": 1,
        "schedule.max_steps": 60,
        "schedule.kind": "constant_with_warmup",
        "optim.name": "adamw",
        "optim.lr": 1e-2,
        "report.prompts": "[]",
    }
    given = [f"{key}={value}" for key, value in options.items()]
    for words in (
        ["model", "import", str(folder / "tiny"), "--name", "language"],
        ["model", "import", str(folder / "clip"), "--name", "clip"],
        ["convert", "assemble", "language", "clip", "--name", "llava"],
        ["dataset", "create", "d", str(data / "rows.json"), str(data / "images")],
        ["train", "smollm2_135m_lora_assistant_e1", "--base", "llava", "--data", "d", "--name", "job",
         "--cfg-options", *given],
        ["convert", "pth_to_hf", "job", "tuned", "--fp32"],
        ["endpoint", "create", "tuned", "--name", "e"],
    ):  # fmt: skip
        done = stack.quartet(*words)
        assert done.returncode == 0, done.stderr + done.stdout
    return data / "images"


def test_what_was_learned_of_images_is_said_of_them(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "home", env={"OMP_NUM_THREADS": "1"}).start()
    try:
        images = taught(stack, tmp_path)
        for colour, answer in SEEN.items():
            image = ["--image", str(images / f"{colour}.png")]
            told = stack.quartet("chat", "e", "-m", "what?", *image, "--temperature", "0", "--max-new-tokens", "16")
            assert told.returncode == 0, told.stderr
            assert told.stdout.strip() == answer
        refused = stack.quartet("train", "smollm2_135m_lora_assistant_e1", "--base", "clip", "--data", "d")
        assert refused.returncode != 0 and "vision tower" in refused.stderr
    finally:
        stack.stop()
