"""A node for a real API server: it takes each pod of a Job, runs its first container as a process of this machine, tells how
it does, ends it when it is deleted, and shows what it printed."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import threading
import time
import urllib.error
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.common.launchers.pods import Json, leave, now, on_this_machine

NAME = "here"
PODS = "api/v1/namespaces/quartet/pods"
MERGE = "application/strategic-merge-patch+json"  # conditions that others wrote stay
TICK_S = 0.05


class Node:
    """`call` asks the API server; `certificate` lies beside its key, and is the node's too."""

    def __init__(self, call: Callable[..., Any], folder: Path, certificate: Path) -> None:
        self._call = call
        self._folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._asked: dict[str, float] = {}
        self._told: set[str] = set()
        self._ended = threading.Event()
        node = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                data = node.log(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.05,)),
            threading.Thread(target=self._run),
        ]

    def start(self) -> Node:
        self._call("POST", "api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NAME}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_address[1]}},
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        self._call("PATCH", f"api/v1/nodes/{NAME}/status", {"status": status}, MERGE)
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        self._ended.set()
        leave(self._server, self._threads, self.processes.values())

    def log(self, path: str) -> bytes:
        """/containerLogs/<namespace>/<pod>/<container>?tailLines=…, as a kubelet has it."""
        url = urlsplit(path)
        lines = (self._folder / f"{url.path.split('/')[3]}.log").read_bytes().splitlines(keepends=True)
        return b"".join(lines[-int(parse_qs(url.query)["tailLines"][0]) :])

    def _run(self) -> None:
        while not self._ended.wait(TICK_S):
            # It may be killed meanwhile, and be back later; a pod may be gone since it was listed.
            with contextlib.suppress(OSError):
                for pod in self._call("GET", PODS)["items"]:
                    with contextlib.suppress(urllib.error.HTTPError):
                        self._look_after(pod)

    def _look_after(self, pod: Json) -> None:
        name, deleted = pod["metadata"]["name"], pod["metadata"].get("deletionTimestamp")
        if "batch.kubernetes.io/job-name" not in pod["metadata"]["labels"]:
            return
        process = self.processes.get(name)
        if "nodeName" not in pod["spec"]:
            target = {"apiVersion": "v1", "kind": "Node", "name": NAME}
            self._call(
                "POST",
                f"{PODS}/{name}/binding",
                {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target},
            )
        elif process is None and not deleted:
            self._begin(pod)
        elif process is None or process.poll() is not None:
            if process is not None and name not in self._told:
                self._tell_end(pod, process.returncode)
                self._told.add(name)
            if deleted:
                self._call("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0})
        elif deleted:
            self._stop(name, process, pod["metadata"]["deletionGracePeriodSeconds"])

    def _begin(self, pod: Json) -> None:
        name = pod["metadata"]["name"]
        words, variables = on_this_machine(pod)
        with (self._folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._tell(pod, "Running", {"running": {"startedAt": now()}}, True)

    def _tell_end(self, pod: Json, code: int) -> None:
        status = code if code >= 0 else 128 - code
        ended = {"exitCode": status, "reason": "Error" if status else "Completed", "finishedAt": now()}
        self._tell(pod, "Failed" if status else "Succeeded", {"terminated": ended}, False)

    def _tell(self, pod: Json, phase: str, state: Mapping[str, Any], ready: bool) -> None:
        container = pod["spec"]["containers"][0]
        told = {"name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0}
        status = {"phase": phase, "containerStatuses": [{**told, "ready": ready, "state": state}]}
        self._call("PATCH", f"{PODS}/{pod['metadata']['name']}/status", {"status": status}, MERGE)

    def _stop(self, name: str, process: subprocess.Popen[bytes], grace_s: float) -> None:
        """Ask first. The grace is counted from when the node heard of it, and may be cut short later."""
        with contextlib.suppress(ProcessLookupError):
            if name not in self._asked:
                self._asked[name] = time.monotonic()
                os.killpg(process.pid, signal.SIGTERM)
            elif time.monotonic() > self._asked[name] + grace_s:
                os.killpg(process.pid, signal.SIGKILL)
