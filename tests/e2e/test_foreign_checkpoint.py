"""XTuner's way with a checkpoint of its own: `convert pth_to_hf CONFIG PTH DIR`, over gRPC, then merge."""

from __future__ import annotations

import json
from pathlib import Path

from tests.e2e.stack import Stack
from tests.finetune.convert.golden.base import lora_base

GOLDEN = Path(__file__).parents[1] / "finetune/convert/golden"
CONFIG = "lora_alpha = 32\nmodel = dict(lora=dict(type=LoraConfig, r=2, lora_alpha=lora_alpha, lora_dropout=0.1))\n"


def test_a_file_and_a_directory_become_adapters(tmp_path: Path) -> None:
    base, config = lora_base(tmp_path / "base"), tmp_path / "mine.py"
    config.write_text(CONFIG)
    stack = Stack(tmp_path / "home").start()
    try:
        assert stack.quartet("model", "import", str(base), "--name", "tiny", "--json").returncode == 0
        alphas = {}
        for name, words in {
            "iter-4": [str(GOLDEN / "iter_4.pth")],
            "zero3": [str(config), str(GOLDEN / "zero3.pth")],
        }.items():
            done = stack.quartet("convert", "pth_to_hf", *words, name, "--base", "tiny", "--fp32", "--json")
            assert done.returncode == 0, done.stderr
            assert stack.quartet("model", "download", name, str(tmp_path / name)).returncode == 0
            alphas[name] = json.loads((tmp_path / name / "adapter_config.json").read_text())["lora_alpha"]
        assert alphas == {"iter-4": 6, "zero3": 32}, "the checkpoint's own config, and the one given"
        done = stack.quartet("convert", "merge", "tiny", "zero3", "tiny-merged", "--json")
        assert done.returncode == 0, done.stderr
        mistakes: dict[tuple[str, ...], str] = {
            (str(GOLDEN / "iter_4.pth"), "x"): "--base",
            (str(tmp_path / "gone.pth"), "x", "--base", "tiny"): "gone.pth",
            ("some-job", "x", "--base", "tiny"): "leave them out",
        }
        for given, said in mistakes.items():
            refused = stack.quartet("convert", "pth_to_hf", *given)
            assert refused.returncode != 0 and said in refused.stderr and "Traceback" not in refused.stderr, (
                refused.stderr
            )
    finally:
        stack.stop()
