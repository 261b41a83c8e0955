"""The whole flow on a real cluster, on what `make deploy` put there, by port-forwards: `make test-cluster`.

NAMESPACE names another namespace than quartet.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.tiny import tiny_model

pytestmark = pytest.mark.cluster

ROOMS = {"datasets": 50051, "training": 50052, "conversion": 50053, "inference": 50054}
NAMESPACE = os.environ.get("NAMESPACE", "quartet")
KUBECTL = [str(Path(sys.executable).with_name("kubectl")), "-n", NAMESPACE]


def kubectl(*words: str, timeout_s: float = 300) -> str:
    done = subprocess.run([*KUBECTL, *words], capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, (words, done.stderr)
    return done.stdout


class Forward:
    """A port of this machine that leads to a pod of a service; made anew when that pod is gone."""

    def __init__(self, room: str) -> None:
        words = ["port-forward", f"deployment/quartet-{room}", f":{ROOMS[room]}"]
        self.process = subprocess.Popen([*KUBECTL, *words], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        told = re.search(r"127.0.0.1:(\d+)", self.process.stdout.readline())
        assert told, f"no way to quartet-{room}"
        self.address = told[0]

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for room in ROOMS:
        kubectl("rollout", "status", f"deployment/quartet-{room}", "--timeout=240s")
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_bytes(base64.b64decode(kubectl("get", "secret", "quartet-token", "-o", "jsonpath={.data.token}")))
    return path


@pytest.fixture()
def addresses(token: Path) -> Iterator[dict[str, str]]:
    ways = {room: Forward(room) for room in ROOMS}
    yield {
        "QUARTET_TOKEN_FILE": str(token),
        **{f"QUARTET_{room.upper()}_ENDPOINT": way.address for room, way in ways.items()},
    }
    for way in ways.values():
        way.close()


def quartet(addresses: Mapping[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "services.client", *words]
    done = subprocess.run(command, env={**os.environ, **addresses}, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def test_the_main_job(addresses: dict[str, str], tmp_path: Path) -> None:
    """Workers and engines as Jobs; a worker's pod that is deleted while it trains is replaced."""
    name = "check-" + uuid.uuid4().hex[:6]
    tiny_model(tmp_path / "tiny")
    rows = tmp_path / "rows.jsonl"
    turns = [[("user", f"What is {n} plus {n}?"), ("assistant", f"It is {2 * n}.")] for n in range(16)]
    messages = [[{"role": role, "content": text} for role, text in turn] for turn in turns]
    rows.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    quartet(addresses, "model", "import", str(tmp_path / "tiny"), "--name", name)
    quartet(addresses, "dataset", "create", name, str(rows))
    job = ["train", "smollm2_135m_qlora_assistant_e1", "--base", name, "--data", name, "--name", name]
    options = ["--cfg-options", "schedule.max_steps=200", "data.max_length=64", "lora.rank=2"]
    command = [sys.executable, "-m", "services.client", *job, *options]
    training = subprocess.Popen(command, env={**os.environ, **addresses}, stdout=subprocess.DEVNULL)
    kubectl("delete", "pod", worker_of(name))
    assert training.wait(timeout=1800) == 0
    quartet(addresses, "convert", "pth_to_hf", name, f"{name}-adapter")
    quartet(addresses, "convert", "merge", name, f"{name}-adapter", f"{name}-merged")
    ask = ["-m", "What is 1 plus 1?", "--max-new-tokens", "4", "--temperature", "0"]
    assert quartet(addresses, "chat", f"{name}-merged", *ask).strip()


def worker_of(name: str, limit_s: float = 600) -> str:
    """The pod that trains, once it runs."""
    deadline = time.monotonic() + limit_s
    while True:
        found = json.loads(kubectl("get", "pods", "-l", "app.kubernetes.io/name=quartet-worker", "-o", "json"))["items"]
        for pod in found:
            own = f"trainingjobs-{name}-" in pod["metadata"]["name"]
            if own and pod["status"]["phase"] == "Running":
                return str(pod["metadata"]["name"])
        assert time.monotonic() < deadline, [p["metadata"]["name"] for p in found]
        time.sleep(0.5)
