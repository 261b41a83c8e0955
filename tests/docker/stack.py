"""What runs in containers, as a client sees it: commands, and containers that are killed while these run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.common.launchers.cluster import Cluster
from tests.docker.podman import ENV, PODS, Host, errors_of, podman

ROOMS = {"datasets": 50051, "training": 50052, "conversion": 50053, "inference": 50054}
GATEWAY = 8000
LASTING = ("quartet-gateway", *(f"quartet-{room}" for room in ROOMS), "quartet-postgres", "quartet-store")
"""The containers that are there all the time."""
ASK = ("-m", "What is 1 plus 1?", "--max-new-tokens", "8", "--temperature", "0")

Meanwhile = Callable[[str, set[str]], None]


def start(host: Host, name: str, *flags: str) -> None:
    """As a kubelet would: what ends is started again."""
    subprocess.run(
        host.words(name, PODS[name], "--detach", "--restart=always", *flags), env=ENV, check=True, capture_output=True
    )


def serving(address: str, limit_s: float = 120) -> None:
    """Wait until a server says that it serves."""
    deadline = time.monotonic() + limit_s
    with grpc.insecure_channel(address) as channel:
        while True:
            try:
                found = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
                if found.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass
            assert time.monotonic() < deadline, address
            time.sleep(0.1)


@dataclass
class Stack:
    """Addresses are QUARTET_<ROOM>_ENDPOINT, and the token's file."""

    host: Host
    k8s: Cluster
    addresses: dict[str, str]
    gateway: str = ""
    started_s: dict[str, float] = field(default_factory=dict)

    def address(self, room: str) -> str:
        return self.addresses[f"QUARTET_{room.upper()}_ENDPOINT"]

    def quartet(self, *words: str, meanwhile: Callable[[], None] = lambda: None) -> str:
        """What a command of the command line printed; while it runs `meanwhile` is called."""
        command = [sys.executable, "-m", "services.client", *words]
        env = {**os.environ, **self.addresses}
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                meanwhile()
                out, err = process.communicate(timeout=540)
            finally:
                process.kill()
        logs = {room: errors_of(f"quartet-{room}")[-1500:] for room in ROOMS} if process.returncode else {}
        assert process.returncode == 0, (words, out, err, logs)
        return out

    def flow(self, name: str, rows: Path, meanwhile: Meanwhile = lambda point, pods: None) -> tuple[str, bytes]:
        """The quickstart's way, each name beginning with `name`; the last answer, and the merged model's weights. While
        each of its five stretches lasts, `meanwhile` is called with its name and the pods of Jobs that were there before."""

        def step(point: str, *words: str) -> str:
            before = set(self.k8s.processes)
            told = self.quartet(*words, meanwhile=lambda: meanwhile(point, before))
            self.up_again()
            return told

        options = ["--cfg-options", "schedule.max_steps=300", "data.max_length=64", "lora.rank=2"]
        job = ["--base", f"{name}-base", "--data", f"{name}-sums", "--name", name, "--save-every", "50"]
        step("import", "model", "import", str(self.host.folder / "tiny"), "--name", f"{name}-base")
        step("upload", "dataset", "create", f"{name}-sums", str(rows))
        # A plan looks at rows, in the training service itself.
        self.quartet("train", "smollm2_135m_qlora_assistant_e1", *job, *options, "--dry-run")
        step("train", "train", "smollm2_135m_qlora_assistant_e1", *job, *options)
        self.quartet("convert", "pth_to_hf", name, f"{name}-adapter")
        step("merge", "convert", "merge", f"{name}-base", f"{name}-adapter", f"{name}-merged")
        answer = step("chat", "chat", f"{name}-merged", *ASK)
        folder = rows.parent / f"{name}-merged"
        self.quartet("model", "download", f"{name}-merged", str(folder))
        [weights] = folder.rglob("model.safetensors")
        return answer.strip(), weights.read_bytes()

    def kill_all(self, pods: Iterable[str]) -> set[str]:
        """Kill these pods of Jobs and all that lasts; this is started again, as a kubelet would. Those that were killed."""
        killed = {pod for pod in pods if self._killed(pod)}
        for name in LASTING:
            podman("kill", name)
            podman("start", name)
        return killed | set(LASTING)

    def up_again(self, limit_s: float = 180) -> None:
        """Wait until all answer, with their store and database: a new command waits for no service that it has not met."""
        deadline = time.monotonic() + limit_s
        for room in ROOMS:
            serving(self.address(room), limit_s)
        command = [sys.executable, "-m", "services.client", "model", "list"]
        while subprocess.run(command, env={**os.environ, **self.addresses}, capture_output=True).returncode:
            assert time.monotonic() < deadline, errors_of("quartet-conversion")[-1500:]
        self.answering()

    def _killed(self, pod: str) -> bool:
        """False if it ended before."""
        while self.k8s.processes[pod].poll() is None:
            if subprocess.run(["podman", "kill", pod], env=ENV, capture_output=True).returncode == 0:
                return True
            time.sleep(0.1)  # it is still being made
        return False

    def answering(self, limit_s: float = 120) -> None:
        """Wait until the gateway answers."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                with urllib.request.urlopen(f"http://{self.gateway}/healthz", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline, errors_of("quartet-gateway")
                time.sleep(0.1)

    def completion(self, model: str, text: str) -> str:
        """What OpenAI's API answers."""
        token = Path(self.addresses["QUARTET_TOKEN_FILE"]).read_text()
        body: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0}
        body["messages"] = [{"role": "user", "content": text}]
        request = urllib.request.Request(
            f"http://{self.gateway}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return str(json.loads(answer.read())["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read()) from error
