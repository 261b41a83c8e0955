"""All of it in containers: the rendered manifests run by podman, driven from outside over gRPC. `make test-containers`.

The images are those that `make images VARIANT=cpu` made. The API of the cluster is tests/common/launchers/cluster.py,
and its kubelet runs the pods of Jobs as containers too.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from quartet.datasets.v1.datasets_pb2 import GetDatasetRequest

from services.client.client import Client
from services.finetune.errors import NotFound, Unavailable
from tests.docker.podman import BASE, ENV, Host, image, podman
from tests.docker.stack import ASK, LASTING, ROOMS, Stack

pytestmark = pytest.mark.containers


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes all that a service's image has for reading rows."""
    turns = [[f"What is {n} plus {n}?", f"It is {2 * n}."] for n in range(16)]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    parquet.write_table(pyarrow.table({"messages": messages}), path, compression="zstd")
    return path


@pytest.fixture(scope="module")
def undisturbed(stack: Stack, rows: Path) -> tuple[str, bytes]:
    """The flow's answer and weights."""
    return stack.flow("calm", rows)


def test_the_main_job(stack: Stack, undisturbed: tuple[str, bytes]) -> None:
    assert undisturbed[0]
    models = json.loads(stack.quartet("model", "list", "--json"))["models"]
    kinds = {m["name"].split("/")[-1]: m["kind"] for m in models}
    assert kinds == {"calm-base": "BASE", "calm-adapter": "ADAPTER", "calm-merged": "MERGED"}
    # Import, training, adapter and merge were each one Job with one pod; an engine for the chat.
    assert len(stack.k8s.processes) >= 5


def test_the_gateway_answers(stack: Stack, undisturbed: tuple[str, bytes]) -> None:
    stack.quartet("endpoint", "create", "calm-merged", "--name", "served")
    try:
        assert stack.completion("served", ASK[1]).strip() == undisturbed[0]
    finally:
        stack.quartet("endpoint", "delete", "served")


def test_what_is_killed_at_five_points_changes_nothing(
    stack: Stack, undisturbed: tuple[str, bytes], rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every container, one after the other, while the flow is on its way: the same weights and the same answer."""
    for name, value in stack.addresses.items():
        monkeypatch.setenv(name, value)
    killed: dict[str, int] = {}

    def disturb(point: str, before: set[str]) -> None:
        with Client() as client:
            _until_under_way(client, point, lambda: set(stack.k8s.processes) - before)
        pods = set(stack.k8s.processes) - before
        killed[point] = len(stack.kill_all(pods)) - len(LASTING)

    answer, weights = stack.flow("stormy", rows, disturb)
    assert killed == {"import": 1, "upload": 0, "train": 1, "merge": 1, "chat": 1}
    assert (answer, weights) == undisturbed


def _until_under_way(client: Client, point: str, new_pods: Callable[[], set[str]], limit_s: float = 240) -> None:
    """Wait for the pod; an upload has none, but makes its dataset first; a training shall have steps to lose."""
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(NotFound, Unavailable):
            if point == "upload":
                client.datasets.GetDataset(GetDatasetRequest(name=client.name("datasets", "stormy-sums")))
                return
            if new_pods() and (point != "train" or client.job("stormy").progress.step > 60):
                return
        assert time.monotonic() < deadline, point
        time.sleep(0.05)


def test_images_hold_what_they_need_and_no_more(host: Host) -> None:
    def python(pod: str, code: str) -> int:
        command = ["podman", "run", "--rm", "--network=none", "--entrypoint", "python", image(pod), "-c", code]
        return subprocess.run(command, env=ENV, capture_output=True).returncode

    for pod in ("quartet-training", "quartet-gateway", "quartet-worker", "quartet-engine"):
        assert python(pod, "import pip") != 0, pod
        assert python(pod, "import shutil, sys; sys.exit(any(map(shutil.which, ('gcc', 'make', 'git'))))") == 0, pod
        assert python(pod, "import os, sys; sys.exit(os.getuid() == 0)") == 0, pod
    assert python("quartet-training", "import torch") != 0
    assert python("quartet-worker", "import torch, peft") == 0
    for absent in ("grpc", "sqlalchemy", "kubernetes", "services.common"):
        assert python("quartet-worker", f"import {absent}") != 0, absent
    for absent in ("sqlalchemy", "kubernetes", "minio", "services.training"):
        assert python("quartet-gateway", f"import {absent}") != 0, absent
    read = "import pyarrow.parquet, pyarrow.csv, pyarrow.feather, pyarrow.ipc, numpy.random, numpy.linalg, tokenizers"
    assert python("quartet-datasets", read) == 0


def test_sizes_and_starts_are_told(host: Host, stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    base = int(podman("image", "inspect", BASE, "--format", "{{.Size}}"))
    with capsys.disabled():
        print(f"\nbase {base / 1e6:.0f} MB")
        for pod in (*(f"quartet-{room}" for room in ROOMS), "quartet-gateway", "quartet-worker", "quartet-engine"):
            over = int(podman("image", "inspect", image(pod), "--format", "{{.Size}}")) - base
            start_s = stack.started_s.get(pod)
            print(f"{pod:20} +{over / 1e6:5.0f} MB" + (f"  serving after {start_s:.1f} s" if start_s else ""))
            if start_s:
                # docs/decisions/0080: they read Parquet, by Arrow and numpy.
                assert over / 1e6 < (290 if pod in ("quartet-datasets", "quartet-training") else 200), pod
