"""The worker under other launchers, which have started its ranks already: it starts none, and it is the same run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from services.finetune.config import to_json
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, run_uri
from services.finetune.store import Store
from tests.finetune.train.running import order, told

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": ("--nproc_per_node", "2", "-m"),
    "deepspeed": ("--num_gpus", "2", "--module"),
}


@pytest.mark.slow
def test_other_launchers_start_the_same_run(file_store: Store, tmp_path: Path) -> None:
    what = order(file_store, tmp_path, schedule__max_steps=4, parallel__processes=2)
    losses = {}
    for name, words in {"": (), **LAUNCHERS}.items():
        key = f"jobs/{name or 'leader'}"
        raise_fence(file_store, key, 1)
        file_store.put(f"{attempt_key(key, 1)}/run.json", dump(to_json(what)))
        command = [str(BIN / name), *words] if name else [sys.executable, "-m"]
        worker = [*command, "services.finetune", "train", run_uri(file_store.uri, key, 1)]
        env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(worker, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (name, done.stderr[-2000:])
        ended = read_outcome(file_store, key)
        assert ended is not None and ended[1].state == "SUCCEEDED"
        assert any("2 processes" in e["text"] for e in told(file_store, key, "log"))
        losses[name] = [e["values"]["loss"] for e in told(file_store, key, "metric")]
    assert len(losses[""]) == 4
    for name in LAUNCHERS:
        assert losses[name] == losses[""]
