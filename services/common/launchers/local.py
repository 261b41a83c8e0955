"""Subprocesses of this machine, each in a session of its own: neither Ctrl-C nor kill -9 of the service ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from services.common.launchers import ONE, Handle, Shape
from services.finetune.errors import FailedPrecondition

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""OpenMP threads that spin while they wait make two torch processes on one machine several times slower; those that sleep
at once make one alone a third slower. So GNU's, which torch has, spin for as long as they do by themselves where they
outnumber the processors (1000 rounds), and others sleep."""


class LocalLauncher:
    """See Launcher. Output goes to ``<home>/logs/<name>.log``."""

    def __init__(self, home: Path) -> None:
        self._logs = home / "logs"

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str], shape: Shape = ONE) -> Handle:
        if shape.nodes != 1:
            raise FailedPrecondition(
                f"workers of this service run on its own machine, which is one and not {shape.nodes}; set parallel.nodes to "
                "1, or run the service on a cluster (--launcher kubernetes)",
                reason="SHAPE_UNAVAILABLE",
            )
        self._logs.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **WAITING, "PYTHONUNBUFFERED": "1", **env}
        with (self._logs / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        handle = {"pid": child.pid, "start_ticks": start_ticks(child.pid)}
        # Somebody must wait for a child, or it stays behind as a zombie for as long as the service runs.
        threading.Thread(target=child.wait, name=f"reap-{child.pid}", daemon=True).start()
        return handle

    def alive(self, handle: Handle) -> bool:
        ticks = start_ticks(int(handle["pid"]))
        return ticks is not None and ticks == handle["start_ticks"]

    def find(self, name: str, claim: Mapping[str, Any] | None) -> Handle | None:
        return {"pid": claim["pid"], "start_ticks": claim["start_ticks"]} if claim else None

    def disrupted(self, handle: Handle) -> bool:
        return False  # a machine takes no process away by itself; a shutdown's SIGTERM is told by the worker

    def broken(self, handle: Handle) -> bool:
        return False  # there is one process, and it left when it was told to

    def trouble(self, handle: Handle) -> str:
        return ""  # what was started runs

    def stop(self, handle: Handle, grace_s: float) -> None:
        if self.alive(handle):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(handle["pid"]), signal.SIGTERM)
            threading.Thread(target=self._kill_later, args=(handle, grace_s), daemon=True).start()

    def tail(self, name: str, lines: int) -> str:
        path = self._logs / f"{name}.log"
        if not path.exists():
            return ""
        with path.open(errors="replace") as log:
            return "".join(deque(log, lines)).strip()

    def _kill_later(self, handle: Handle, grace_s: float) -> None:
        deadline = time.monotonic() + grace_s
        while self.alive(handle):
            if time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(handle["pid"]), signal.SIGKILL)
                return
            time.sleep(0.05)


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: tells it from a later one with its pid. None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
