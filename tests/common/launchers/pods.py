"""What runs for a pod, and small things of the API that the cluster of these tests speaks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from typing import Any

Json = dict[str, Any]
Command = Callable[[Json], tuple[Sequence[str], Mapping[str, str]]]


def on_this_machine(pod: Json) -> tuple[Sequence[str], Mapping[str, str]]:
    """Pods share this machine's address, and its environment where they would refer to secrets."""
    container = pod["spec"]["containers"][0]
    assert container["command"] == ["python"]
    variables = {e["name"]: e["value"] for e in container.get("env", ()) if "value" in e}
    fields = {e["name"]: e["valueFrom"].get("fieldRef") for e in container.get("env", ()) if "valueFrom" in e}
    variables |= {name: "127.0.0.1" for name, field in fields.items() if field == {"fieldPath": "status.podIP"}}
    for key, value in pod["metadata"].get("annotations", {}).items():
        variables |= {n: value for n, f in fields.items() if f == {"fieldPath": f"metadata.annotations['{key}']"}}
    if "MASTER_ADDR" in variables:
        variables["MASTER_ADDR"] = "127.0.0.1"
    return [sys.executable, *container["args"]], variables


def leave(
    server: ThreadingHTTPServer, threads: Iterable[threading.Thread], processes: Iterable[subprocess.Popen[bytes]]
) -> None:
    """Stop answering, and end what ran for pods."""
    server.shutdown()
    server.server_close()
    for thread in threads:
        thread.join()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def now(later_s: float = 0) -> str:
    return (datetime.now(UTC) + timedelta(seconds=later_s)).strftime("%Y-%m-%dT%H:%M:%SZ")


def matches(found: Json, query: Mapping[str, str]) -> bool:
    key, _, value = query["labelSelector"].partition("=")
    return bool(found["metadata"].get("labels", {}).get(key) == value)


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
