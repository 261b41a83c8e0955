"""A model cut, exported as GGUF, fetched and brought in again, and a quantised one, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.stack import Stack
from tests.finetune.convert.test_export import random_model
from tests.finetune.convert.test_merge import tensors


@pytest.mark.slow
def test_out_and_in_again(tmp_path: Path) -> None:
    folder = random_model("Qwen2ForCausalLM", tmp_path / "model")
    stack = Stack(tmp_path / "home").start()

    def quartet(*words: str) -> dict[str, object]:
        done = stack.quartet(*words, "--json")
        assert done.returncode == 0, done.stderr
        last: dict[str, object] = json.loads(done.stdout.splitlines()[-1]) if done.stdout.startswith("{") else {}
        return last

    try:
        quartet("model", "import", str(folder), "--name", "tiny")
        quartet("convert", "split", "tiny", "tiny-split", "--max-shard-size", "500KB")
        quartet("convert", "export", "tiny-split", "tiny-gguf", "--form", "gguf", "--type", "f32")
        quartet("convert", "quantize", "tiny", "tiny-fp8", "--method", "fp8")
        for name in ("tiny-split", "tiny-gguf", "tiny-fp8"):
            quartet("model", "download", name, str(tmp_path / name))
        shards = sorted(p.name for p in (tmp_path / "tiny-split").glob("*.safetensors"))
        assert len(shards) > 1 and all((tmp_path / "tiny-split" / s).stat().st_size <= 500_000 for s in shards)
        quartet("model", "import", str(tmp_path / "tiny-gguf/tiny-split-f32.gguf"), "--name", "back")
        quartet("model", "download", "back", str(tmp_path / "back"))
        before, after = tensors(folder), tensors(tmp_path / "back")
        assert before.keys() == after.keys()
        assert all((after[k].float() == v.bfloat16().float()).all() for k, v in before.items() if "rotary" not in k)
        mistakes: dict[tuple[str, ...], str] = {
            ("export", "tiny", "x", "--to", "hf://me/x"): "--export-prefixes",
            ("export", "tiny-fp8", "x", "--form", "gguf"): "made from",
            ("split", "tiny-gguf", "x"): "EXPORTED",
            ("quantize", "tiny", "x", "--method", "gptq"): "calibration",
        }
        for given, said in mistakes.items():
            refused = stack.quartet("convert", *given)
            assert refused.returncode != 0 and said in refused.stderr and "Traceback" not in refused.stderr
        assert stack.quartet("train", "smollm2_135m_qlora_assistant_e2", "--base", "tiny-fp8").returncode != 0
    finally:
        stack.stop()
