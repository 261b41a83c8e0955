"""All of it in containers: the rendered manifests run by podman, driven from outside over gRPC. `make test-containers`.

The images are those that `make images VARIANT=cpu` made. The API of the cluster is tests/common/launchers/cluster.py,
and its kubelet runs the pods of Jobs as containers too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.common.launchers.cluster import Cluster, cluster
from tests.common.launchers.pods import Json
from tests.docker.podman import ENV, Host, have, make_database_image, make_store_image, podman
from tests.k8s.rendered import of_kind, overlay, pods
from tests.tiny import tiny_model

pytestmark = pytest.mark.containers

ROOMS = {"datasets": 50051, "training": 50052, "conversion": 50053, "inference": 50054}
PODS = dict(pods(overlay("local")))
BASE = os.environ.get("BASE", "docker.io/library/python:3.12-slim-bookworm")
STARTED: dict[str, float] = {}


def image(pod: str) -> str:
    return str(PODS[pod]["spec"]["containers"][0]["image"])


def start(host: Host, name: str, *flags: str) -> None:
    subprocess.run(host.words(name, PODS[name], "--detach", *flags), env=ENV, check=True, capture_output=True)


def serving(address: str, limit_s: float = 90) -> None:
    """Wait until a server says that it serves."""
    deadline = time.monotonic() + limit_s
    with grpc.insecure_channel(address) as channel:
        while True:
            try:
                found = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
                if found.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                assert time.monotonic() < deadline, address
                time.sleep(0.1)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    for pod in ("quartet-datasets", "quartet-worker", "quartet-engine"):
        assert have(image(pod)), f"make images VARIANT=cpu makes {image(pod)}"
    for pod, make in (("quartet-store", make_store_image), ("quartet-postgres", make_database_image)):
        if not have(image(pod)):
            make(image(pod), BASE, tmp_path_factory.mktemp("image"))
    folder = tmp_path_factory.mktemp("host")
    tiny_model(folder / "tiny")
    [settings] = of_kind(overlay("local"), "ConfigMap")
    # The command line looks for a folder where it runs before it asks a service to import it: one path for both.
    config = {**settings["data"], "QUARTET_IMPORT_ROOTS": str(folder / "tiny")}
    for path in [folder, *folder.parents[:2], *folder.rglob("*")]:
        path.chmod(0o755)  # containers run as users of their own
    running = Host(folder, config, mounts=[f"{folder / 'tiny'}:{folder / 'tiny'}:ro"]).open()
    yield running
    running.close()


@pytest.fixture(scope="module")
def k8s(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    def run(pod: Json) -> tuple[list[str], Mapping[str, str]]:
        return host.words(pod["metadata"]["name"], pod), ENV

    with cluster(tmp_path_factory.mktemp("cluster"), "0.0.0.0", run) as running:
        yield running


@pytest.fixture(scope="module")
def addresses(host: Host, k8s: Cluster) -> dict[str, str]:
    """QUARTET_<ROOM>_ENDPOINT of the four services, as published on this machine."""
    start(host, "quartet-store")
    start(host, "quartet-postgres")
    deadline = time.monotonic() + 60
    while "ready to accept" not in podman("logs", "quartet-postgres", check=False) + _errors("quartet-postgres"):
        assert time.monotonic() < deadline, _errors("quartet-postgres")
        time.sleep(0.2)
    found = {"QUARTET_TOKEN_FILE": str(host.folder / "quartet-token" / "token")}
    for room, port in ROOMS.items():
        config = k8s.kubeconfig(f"quartet-{room}", host.gateway)
        config.chmod(0o644)
        flags = [
            "-p",
            f"127.0.0.1::{port}",
            "-v",
            f"{config}:/etc/kubeconfig:ro",
            "--env",
            "KUBECONFIG=/etc/kubeconfig",
        ]
        begun = time.monotonic()
        start(host, f"quartet-{room}", *flags)
        address = podman("port", f"quartet-{room}", f"{port}/tcp")
        serving(address)
        STARTED[room] = time.monotonic() - begun
        found[f"QUARTET_{room.upper()}_ENDPOINT"] = address
    return found


def _errors(name: str) -> str:
    return subprocess.run(["podman", "logs", name], env=ENV, capture_output=True, text=True).stderr


def quartet(addresses: Mapping[str, str], *words: str) -> str:
    command = [sys.executable, "-m", "services.client", *words]
    done = subprocess.run(command, env={**os.environ, **addresses}, capture_output=True, text=True, timeout=400)
    logs = {room: _errors(f"quartet-{room}")[-1500:] for room in ROOMS} if done.returncode else {}
    assert done.returncode == 0, (words, done.stdout, done.stderr, logs)
    return done.stdout


def test_the_main_job(addresses: dict[str, str], host: Host, k8s: Cluster, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns = [[f"What is {n} plus {n}?", f"It is {2 * n}."] for n in range(16)]
    messages = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in turns]
    rows.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    quartet(addresses, "model", "import", str(host.folder / "tiny"), "--name", "tiny")
    quartet(addresses, "dataset", "create", "sums", str(rows))
    options = ["--cfg-options", "schedule.max_steps=2", "data.max_length=64", "lora.rank=2"]
    job = ["--base", "tiny", "--data", "sums", "--name", "job"]
    quartet(addresses, "train", "smollm2_135m_qlora_assistant_e1", *job, *options)
    quartet(addresses, "convert", "pth_to_hf", "job", "tiny-adapter")
    quartet(addresses, "convert", "merge", "tiny", "tiny-adapter", "tiny-merged")
    ask = ["-m", "What is 1 plus 1?", "--max-new-tokens", "4", "--temperature", "0"]
    merged = quartet(addresses, "chat", "tiny-merged", *ask)
    assert merged.strip()

    # Each service killed, started again, and asked for what it knew.
    for room in ROOMS:
        podman("kill", f"quartet-{room}")
        podman("start", f"quartet-{room}")
        serving(addresses[f"QUARTET_{room.upper()}_ENDPOINT"])
    assert quartet(addresses, "chat", "tiny-merged", *ask) == merged
    kinds = {
        m["name"].split("/")[-1]: m["kind"] for m in json.loads(quartet(addresses, "model", "list", "--json"))["models"]
    }
    assert kinds == {"tiny": "BASE", "tiny-adapter": "ADAPTER", "tiny-merged": "MERGED"}
    # Import, training, adapter and merge were each one Job with one pod; an engine for each chat.
    assert len(k8s.processes) >= 5


def test_images_hold_what_they_need_and_no_more(host: Host) -> None:
    def python(pod: str, code: str) -> int:
        command = ["podman", "run", "--rm", "--network=none", "--entrypoint", "python", image(pod), "-c", code]
        return subprocess.run(command, env=ENV, capture_output=True).returncode

    for pod in ("quartet-training", "quartet-worker", "quartet-engine"):
        assert python(pod, "import pip") != 0, pod
        assert python(pod, "import shutil, sys; sys.exit(any(map(shutil.which, ('gcc', 'make', 'git'))))") == 0, pod
        assert python(pod, "import os, sys; sys.exit(os.getuid() == 0)") == 0, pod
    assert python("quartet-training", "import torch") != 0
    assert python("quartet-worker", "import torch, peft") == 0
    for absent in ("grpc", "sqlalchemy", "kubernetes", "services.common"):
        assert python("quartet-worker", f"import {absent}") != 0, absent


def test_sizes_and_starts_are_told(host: Host, addresses: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    base = int(podman("image", "inspect", BASE, "--format", "{{.Size}}"))
    with capsys.disabled():
        print(f"\nbase {base / 1e6:.0f} MB")
        for pod in (*(f"quartet-{room}" for room in ROOMS), "quartet-worker", "quartet-engine"):
            size = int(podman("image", "inspect", image(pod), "--format", "{{.Size}}"))
            start_s = STARTED.get(pod.removeprefix("quartet-"))
            print(f"{pod:20} +{(size - base) / 1e6:5.0f} MB" + (f"  serving after {start_s:.1f} s" if start_s else ""))
            assert size > base
