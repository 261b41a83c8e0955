"""The tutorial's text part as its readers type it: `quartet` for `xtuner`, SmolLM2 where internlm-chat-7b stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.stack import Stack

NAME = "internlm_chat_7b_qlora_oasst1_e3"
SEED = Path(__file__).parents[1] / "finetune" / "recipes" / "xtuner" / "seed.py.txt"
SCRIPT = f"""
set -eu
quartet list-cfg --seed | grep -x {NAME}
quartet copy-cfg {NAME} .

# The tutorial's edits: the model and the data are folders here.
sed -i "s#'internlm/internlm-chat-7b'#'./internlm-chat-7b'#" {NAME}_copy.py
sed -i "s#'timdettmers/openassistant-guanaco'#'./openassistant-guanaco'#" {NAME}_copy.py
# A smaller run than a GPU's.
sed -i "s/^max_length = 2048/max_length = 128/; s/^max_epochs = 3/max_epochs = 1/" {NAME}_copy.py
sed -i "s/^accumulative_counts = 16/accumulative_counts = 2/" {NAME}_copy.py

quartet train ./{NAME}_copy.py --deepspeed deepspeed_zero2 --work-dir ./work_dirs/{NAME}_copy \\
  --cfg-options report.sample_tokens=4
quartet convert pth_to_hf "$(cat ./work_dirs/{NAME}_copy/last_checkpoint)" hf
quartet convert merge ./internlm-chat-7b hf merged --max-shard-size 2GB
quartet chat merged --prompt-template internlm_chat -m 'What is 2 plus 2?' --max-new-tokens 4
"""


@pytest.fixture()
def folder(stack: Stack, tmp_path: Path) -> Path:
    """~/ft-oasst1 before the first command: the config as XTuner ships it, the model, the data."""
    text = SEED.read_text("utf-8")
    for hub, here in (
        ("internlm/internlm-chat-7b", "./internlm-chat-7b"),
        ("timdettmers/openassistant-guanaco", "./openassistant-guanaco"),
    ):
        assert (
            f"= '{here}'" in text and f"# {'pretrained_model_name_or_path' if 'chat' in hub else 'data_path'}" in text
        )
        text = text.replace(f"= '{here}'", f"= '{hub}'")
    (tmp_path / f"{NAME}_copy.py").write_text(text, "utf-8")
    done = stack.quartet("model", "download", "smollm2", str(tmp_path / "internlm-chat-7b"))
    assert done.returncode == 0, done.stderr
    data = tmp_path / "openassistant-guanaco"
    data.mkdir()
    rows = [{"text": f"### Human: What is {n} plus {n}?### Assistant: {n} plus {n} is {2 * n}."} for n in range(8)]
    for split in ("train", "eval"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"openassistant_best_replies_{split}.jsonl").write_text(lines, "utf-8")
    command = tmp_path / "bin" / "quartet"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m services.client "$@"\n')
    command.chmod(0o755)
    return tmp_path


@pytest.mark.slow
def test_the_tutorial(stack: Stack, folder: Path) -> None:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = {**os.environ, "QUARTET_ENDPOINT": stack.address, "PATH": path}
    done = subprocess.run(
        ["sh", "-c", SCRIPT], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-3000:])
    assert (folder / f"{NAME}_copy.yaml").exists()
    told = done.stdout
    assert "deepspeed_zero2 deals nothing out in one process" in told
    assert told.count("SUCCEEDED") == 3, "training, the adapter, the merge"
    assert told.strip().splitlines()[-1] != "SUCCEEDED", "and an answer"
