"""The processes of one run: which of them this one is, and how a rank tells its node's leader what happens.

A worker started alone is the leader of its node (leader.py): it starts a rank a GPU, or `parallel.processes`. One that
finds RANK in its environment is a rank: of a leader, if LINE is there too, else of torchrun or the deepspeed launcher,
where rank 0 speaks for the run. Several machines: NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say which one this is and
where rank 0 is found; all have as many ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.finetune.config import ParallelConfig
from services.finetune.errors import FailedPrecondition
from services.finetune.progress import Event

LINE = "QUARTET_RANK_LINE"
"""The environment's name for the file descriptor of a rank's line to its leader."""
ALIVE_S = 1.0
"""Seconds between signs of life."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among those of its run."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Among those of its machine."""
    local_world: int = 1
    """How many those are."""


def place(environ: Mapping[str, str]) -> Place | None:
    """The place that whoever started this process gave it; None if nobody did."""
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    world = environ["WORLD_SIZE"]
    local = int(environ.get("LOCAL_RANK", "0")), int(environ.get("LOCAL_WORLD_SIZE", world))
    return Place(int(environ["RANK"]), int(world), *local)


def node(environ: Mapping[str, str]) -> tuple[int, int]:
    """(this machine's number, how many there are)."""
    return int(environ.get("NODE_RANK", "0")), int(environ.get("NNODES", "1"))


def follows(environ: Mapping[str, str]) -> bool:
    """Whether another process claims the attempt and speaks for the run."""
    own = place(environ)
    return own.rank > 0 if own else node(environ)[0] > 0


def wanted(config: ParallelConfig, environ: Mapping[str, str]) -> int:
    """How many ranks this machine is to have. FailedPrecondition (NODES_MISMATCH, GPUS_MISSING)."""
    nodes = node(environ)[1]
    if config.nodes != nodes:
        raise FailedPrecondition(
            f"parallel.nodes is {config.nodes}, but the worker was started on {nodes} machines (NNODES); a launcher of one "
            "machine needs parallel.nodes 1",
            reason="NODES_MISMATCH",
        )
    gpus = _gpus()
    if gpus and config.processes > gpus:
        raise FailedPrecondition(
            f"parallel.processes is {config.processes}, but the machine has {gpus} GPUs; each rank needs one of its own",
            reason="GPUS_MISSING",
        )
    return config.processes or gpus or 1


def _gpus() -> int:
    # Only where there may be some is it worth loading torch: a leader needs nothing else of it.
    if not Path("/dev/nvidiactl").exists():
        return 0
    import torch

    return torch.cuda.device_count()


class Line:
    """A rank's way to its leader: JSON objects, one a line, from any thread. A rank ends with its leader."""

    def __init__(self, descriptor: int) -> None:
        self._out = os.fdopen(descriptor, "wb")
        self._lock = threading.Lock()
        # Also a rank that is stopped, or deep in a library, ends with its leader.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=self._live, name="alive", daemon=True).start()

    def send(self, message: Event) -> None:
        data = json.dumps(message, ensure_ascii=False).encode() + b"\n"
        try:
            with self._lock:
                self._out.write(data)
                self._out.flush()
        except OSError:
            os._exit(1)  # nobody is left to work for

    def _live(self) -> None:
        while True:
            self.send({"type": "alive"})
            time.sleep(ALIVE_S)


def open_line(environ: Mapping[str, str]) -> Line | None:
    """The line of this process to its leader, if it has one. Called once."""
    return Line(int(environ[LINE])) if LINE in environ else None
