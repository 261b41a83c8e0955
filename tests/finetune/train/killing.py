"""kill -9 of trainers at moments drawn by a seed, half of them while a checkpoint is being written."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


class Trainer(Protocol):
    """One way to train that can be cut off: a run that goes on where it was each time it is started."""

    folder: Path
    """Where it writes checkpoints before they are complete, in folders named checkpoint-<step>."""

    def start(self) -> subprocess.Popen[bytes]: ...

    def ended(self) -> bool:
        """Whether the run reached its end; its outcome is then compared, and the next start begins another."""


@dataclass(slots=True)
class Toll:
    kills: int = 0
    in_writes: int = 0
    lost: list[str] = field(default_factory=list)
    """Starts after a kill that failed by themselves."""
    runs: int = 0


def kill_often(trainer: Trainer, kills: int, seed: int, longest_s: float = 4.0) -> Toll:
    """Start, kill, start again; the last run is left to end. Replayable: equal seeds draw equal moments."""
    draw, toll = random.Random(seed), Toll()
    while toll.kills < kills or not trainer.ended():
        process = trainer.start()
        if toll.kills >= kills:
            if process.wait(600) != 0:
                toll.lost.append(f"the last start after kill {toll.kills}: status {process.returncode}")
                return toll
            continue
        # Most of them once it steps, however long a start takes here: the next start is to have something to go on from.
        kind = draw.choices(("write", "between", "start"), (5, 4, 1))[0]
        for _ in range({"write": draw.randint(1, 4), "between": 1, "start": 0}[kind]):
            wait_for_write(process, trainer.folder)
        in_write = kind == "write"
        wait_for_end(process, draw.uniform(0, 0.03 if in_write else longest_s))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            toll.kills += 1
            toll.in_writes += in_write
        elif process.returncode != 0:
            toll.lost.append(f"after kill {toll.kills}: status {process.returncode}")
            return toll
        toll.runs += trainer.ended()
    return toll


def writes(folder: Path) -> set[tuple[str, float]]:
    """Checkpoints that are or were being written, with when they were begun."""
    found = set()
    # Not rglob: what a worker takes away while one looks ends that.
    for parent, folders, files in os.walk(folder):
        for name in fnmatch.filter(folders + files, "checkpoint-*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((f"{parent}/{name}", os.stat(f"{parent}/{name}").st_ctime))
    return found


def wait_for_write(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Until the next checkpoint is begun, or the process ends."""
    known = writes(folder)
    while process.poll() is None and not writes(folder) - known:
        time.sleep(0.002)


def wait_for_end(process: subprocess.Popen[bytes], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
