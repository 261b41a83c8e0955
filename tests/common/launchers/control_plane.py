"""A real API server with its Job controller, where programs for one are at hand: `make test-control-plane`.

CONTROL_PLANE names a folder with etcd, kube-apiserver and kube-controller-manager. No package has all three, and containers
need more of a machine than tests may ask for; so the rest of what cluster.py plays is played here too: node.py runs pods.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.common.launchers.node import Node
from tests.common.launchers.pods import Json
from tests.k8s.rendered import overlay

CONTROLLERS = "job-controller,garbage-collector-controller,ttl-after-finished-controller,resourcequota-controller"
KUBECTL = str(Path(sys.executable).with_name("kubectl"))
ACCOUNTS = ("quartet-datasets", "quartet-training", "quartet-conversion", "quartet-inference")
LIMIT_S = 180.0


class ControlPlane:
    """Quartet's `local` overlay applied to an API server of its own."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.folder = folder
        self._programs = programs
        self._certificate = folder / "certificates" / "apiserver.crt"  # the server makes it
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.tokens = {name: secrets.token_hex(16) for name in ("admin", *ACCOUNTS)}
        etcd, peer, self._port = _free_ports(3)
        self._etcd = f"http://127.0.0.1:{etcd}"
        self._peer = f"http://127.0.0.1:{peer}"

    def start(self) -> ControlPlane:
        key = self.folder / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        users = [(self.tokens["admin"], "admin", "1", "system:masters")]
        users += [(self.tokens[a], f"system:serviceaccount:quartet:{a}", a, "") for a in ACCOUNTS]
        (self.folder / "tokens.csv").write_text("".join(f'{t},{n},{u},"{g}"\n' for t, n, u, g in users))
        self._begin(
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={self._etcd}",
            f"--advertise-client-urls={self._etcd}",
            f"--listen-peer-urls={self._peer}",
            f"--initial-advertise-peer-urls={self._peer}",
            f"--initial-cluster=default={self._peer}",
        )
        self.serve()
        admin = self.kubeconfig("admin")
        self._begin(
            "kube-controller-manager",
            f"--kubeconfig={admin}",
            f"--service-account-private-key-file={key}",
            f"--controllers={CONTROLLERS}",
            "--leader-elect=false",
            "--secure-port=0",
        )
        self.apply(overlay("local"))
        self.node = Node(self.call, self.folder, self._certificate).start()
        return self

    def serve(self) -> None:
        """Start the API server, and wait until it answers."""
        key = self.folder / "accounts.key"
        self._begin(
            "kube-apiserver",
            f"--etcd-servers={self._etcd}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--cert-dir={self.folder / 'certificates'}",
            "--authorization-mode=RBAC",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-cluster-ip-range=10.0.0.0/24",
            "--kubelet-preferred-address-types=InternalIP",
        )
        deadline = time.monotonic() + LIMIT_S
        while True:
            with contextlib.suppress(OSError):
                if self.call("GET", "readyz")["text"] == "ok":
                    return
            assert self._running["kube-apiserver"].poll() is None, self._log("kube-apiserver")
            assert time.monotonic() < deadline, self._log("kube-apiserver")
            time.sleep(0.2)

    def kill_api(self) -> None:
        self._running["kube-apiserver"].kill()
        self._running["kube-apiserver"].wait()

    def close(self) -> None:
        if hasattr(self, "node"):
            self.node.close()
        for process in reversed(self._running.values()):
            process.kill()
            process.wait()

    def apply(self, manifests: Sequence[Json]) -> str:
        """What kubectl said; a warning of the server is no success."""
        for name in ("postgres", "store"):  # the sizes of their disks cannot be changed
            with contextlib.suppress(urllib.error.HTTPError):
                self.call("DELETE", f"apis/apps/v1/namespaces/quartet/statefulsets/quartet-{name}")
        words = ["apply", "--server-side", "--force-conflicts", "--warnings-as-errors", "-f", "-"]
        done = subprocess.run(
            [KUBECTL, "--kubeconfig", str(self.kubeconfig("admin")), *words],
            input=yaml.safe_dump_all(manifests),
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout

    def kubeconfig(self, account: str) -> Path:
        """A file that lets an account in."""
        path = self.folder / f"kubeconfig-{account}"
        cluster = {"server": f"https://127.0.0.1:{self._port}", "certificate-authority": str(self._certificate)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": "quartet"}}],
            "clusters": [{"name": "c", "cluster": cluster}],
            "users": [{"name": "u", "user": {"token": self.tokens[account]}}],
        }
        path.write_text(yaml.safe_dump(content))
        return path

    def call(self, method: str, path: str, body: Json | None = None, kind: str = "application/json") -> Json:
        """A call of the administrator's. HTTPError."""
        headers = {"Authorization": f"Bearer {self.tokens['admin']}", "Content-Type": kind}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"https://127.0.0.1:{self._port}/{path}", data, headers, method=method)
        context = ssl.create_default_context(cafile=self._certificate)
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            text = answer.read().decode()
        found: Json = json.loads(text) if text.startswith("{") else {"text": text}
        return found

    def clear(self) -> None:
        """Remove all Jobs and their pods."""
        root = "apis/batch/v1/namespaces/quartet/jobs"
        for job in self._items(root):
            with contextlib.suppress(urllib.error.HTTPError):
                self.call("DELETE", f"{root}/{job['metadata']['name']}", {"propagationPolicy": "Foreground"})
        deadline = time.monotonic() + LIMIT_S
        while self._items(root) or self.pods():
            assert time.monotonic() < deadline, (self._items(root), self.pods())
            time.sleep(0.1)

    def _items(self, path: str) -> list[Json]:
        items: list[Json] = self.call("GET", path)["items"]
        return items

    def pods(self, job: str = "") -> list[Json]:
        found = self._items("api/v1/namespaces/quartet/pods")
        return [p for p in found if not job or p["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job]

    def pod_of(self, handle: Mapping[str, Any]) -> str:
        """The newest pod of a Job, once it has one that runs."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            found = [p["metadata"] for p in self.pods(handle["job"]) if p["status"].get("phase") == "Running"]
            if found:
                return str(max(found, key=lambda m: str(m["creationTimestamp"]))["name"])
            assert time.monotonic() < deadline, self.pods(handle["job"])
            time.sleep(0.05)

    def pid_of(self, handle: Mapping[str, Any]) -> int:
        return self.node.processes[self.pod_of(handle)].pid

    def evict(self, pod: str) -> None:
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": "quartet"}}
        self.call("POST", f"api/v1/namespaces/quartet/pods/{pod}/eviction", body)

    def _begin(self, program: str, *flags: str) -> None:
        with (self.folder / f"{program}.log").open("ab") as log:
            process = subprocess.Popen([str(self._programs / program), *flags], stdout=log, stderr=log, cwd=self.folder)
        self._running[program] = process

    def _log(self, program: str) -> str:
        return (self.folder / f"{program}.log").read_text()[-3000:]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextlib.contextmanager
def control_plane(folder: Path) -> Iterator[ControlPlane]:
    programs = Path(os.environ["CONTROL_PLANE"])
    made = ControlPlane(programs, folder)
    try:
        yield made.start()
    finally:
        made.close()
