"""The worker under other launchers, which have started its ranks already, and on two machines: it is the same run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from services.finetune.config import override, to_json
from services.finetune.orders import TrainRun
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, run_uri
from services.finetune.store import Store
from tests.finetune.train.running import order, told

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": ("--nproc_per_node", "2", "-m"),
    "deepspeed": ("--num_gpus", "2", "--module"),
}


ENV = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_WAIT_POLICY": "PASSIVE"}


def put(store: Store, what: TrainRun, key: str) -> str:
    """The URI of an order that waits for its worker."""
    raise_fence(store, key, 1)
    store.put(f"{attempt_key(key, 1)}/run.json", dump(to_json(what)))
    return run_uri(store.uri, key, 1)


def losses(store: Store, key: str) -> list[float]:
    """Of a run that ended well, in two processes."""
    ended = read_outcome(store, key)
    assert ended is not None and ended[1].state == "SUCCEEDED"
    assert any("2 processes" in e["text"] for e in told(store, key, "log"))
    return [e["values"]["loss"] for e in told(store, key, "metric")]


@pytest.mark.slow
def test_other_launchers_and_two_machines_are_the_same_run(file_store: Store, tmp_path: Path) -> None:
    what = order(file_store, tmp_path, schedule__max_steps=4, parallel__processes=2)
    for name, words in {"leader": (), **LAUNCHERS}.items():
        command = [str(BIN / name), *words] if words else [sys.executable, "-m"]
        worker = [*command, "services.finetune", "train", put(file_store, what, f"jobs/{name}")]
        done = subprocess.run(worker, env=ENV, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (name, done.stderr[-2000:])
    parted = override(what.config, {"parallel.processes": 1, "parallel.nodes": 2})
    uri = put(file_store, replace(what, config=parted), "jobs/machines")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meet = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "services.finetune", "train", uri]
    machines = [subprocess.Popen(command, env={**ENV, **meet, "NODE_RANK": str(n)}) for n in range(2)]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    alone = losses(file_store, "jobs/leader")
    assert len(alone) == 4
    for name in (*LAUNCHERS, "machines"):
        assert losses(file_store, f"jobs/{name}") == alone
