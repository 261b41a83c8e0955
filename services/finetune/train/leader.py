"""The leader of a node's ranks: it starts them, passes on what they tell, and ends all when one is dead or hangs.

It never loads torch. Ranks have process groups of their own, so a signal reaches them through the leader only; the kernel
ends them with it (ranks.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from services.finetune.errors import Cancelled, DeadlineExceeded, QuartetError, Unavailable, from_json
from services.finetune.progress import Attempt, Event
from services.finetune.train.ranks import LINE, node

STUCK_S = 40.0
"""No rank made progress for so long, or for STUCK_TIMES the longest pause so far: one of them hangs."""
STUCK_TIMES = 10
SILENT_S = 20.0
"""A training rank that gives no sign of life for so long is stopped, or its machine is."""
SILENT_START_S = 120.0
"""The same before its first step: loading libraries may keep Python from running."""
LOOK_S = 0.2
EXPLAIN_S = 3.0
"""When a rank fails its neighbours do too: so long is waited for the one that can say why."""
LAST_S = 60.0
"""After the run's outcome, ranks get so long to end by themselves."""


@dataclass(slots=True)
class Rank:
    """A rank as its leader sees it. Times are of the monotonic clock."""

    number: int
    process: subprocess.Popen[bytes]
    alive: float
    last: deque[str] = field(default_factory=lambda: deque(maxlen=3))
    """What it printed last."""
    limited: bool = False
    """Whether it is in a phase that has a known length."""
    told: Event | None = None
    """Its outcome, or its fault."""


class Leader:
    """The ranks of one node for one attempt, each a process of `command`. `run` is the whole of it."""

    def __init__(self, attempt: Attempt, stop: threading.Event, local: int, command: Sequence[str]) -> None:
        self.attempt = attempt
        self.stop = stop
        self.local = local
        self.command = list(command)
        self.node, self.nodes = node(os.environ)
        self.ranks: list[Rank] = []
        self._threads: list[threading.Thread] = []
        self._heard: queue.SimpleQueue[tuple[Rank, Event]] = queue.SimpleQueue()
        self._moved = time.monotonic()
        """When a rank last made progress."""
        self._longest = 0.0
        self._failed = 0.0
        """When the first rank failed."""

    def run(self) -> dict[str, Any]:
        """Run the attempt to its end; the result that rank 0 told, or {} on other nodes.

        Raises what a rank raised, Cancelled (STOPPED), Unavailable (RANK_LOST), DeadlineExceeded (RANK_HUNG).
        """
        try:
            self._start()
            return self._watch()
        finally:
            self._end()

    def _start(self) -> None:
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        shared = {
            **os.environ,
            "MASTER_ADDR": address or "127.0.0.1",
            "MASTER_PORT": port or str(free_port()),
            "WORLD_SIZE": str(self.local * self.nodes),
            "LOCAL_WORLD_SIZE": str(self.local),
        }
        # Together they have the processors that one worker had.
        shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.local)))
        # Waiting threads that spin would take them from each other.
        shared.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        shared["PYTHONUNBUFFERED"] = "1"
        for n in range(self.local):
            self.ranks.append(self._start_one(n, shared))
        where = f", machine {self.node + 1} of {self.nodes}" if self.nodes > 1 else ""
        self.attempt.emit("log", level="info", text=f"training in {self.local * self.nodes} processes{where}")

    def _start_one(self, n: int, shared: Mapping[str, str]) -> Rank:
        number = self.node * self.local + n
        heard, line = os.pipe()
        try:
            child = subprocess.Popen(
                self.command,
                env={**shared, "RANK": str(number), "LOCAL_RANK": str(n), LINE: str(line)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(line,),
                process_group=0,
            )
        finally:
            os.close(line)
        rank = Rank(number, child, time.monotonic())
        assert child.stdout is not None
        for target, source in ((self._listen, os.fdopen(heard, "rb")), (self._print, child.stdout)):
            thread = threading.Thread(target=target, args=(rank, source), name=f"rank-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        return rank

    def _listen(self, rank: Rank, line: BinaryIO) -> None:
        with line:
            for text in line:
                with contextlib.suppress(ValueError):  # a rank that was killed in the middle of a word
                    self._heard.put((rank, json.loads(text)))

    def _print(self, rank: Rank, output: BinaryIO) -> None:
        """What a rank prints goes to the worker's own log, with its number."""
        with output:
            for raw in output:
                text = raw.decode(errors="replace").rstrip()
                rank.last.append(text)
                sys.stderr.write(f"rank {rank.number}: {text}\n")  # one call: print's second could be another rank's
                sys.stderr.flush()

    def _watch(self) -> dict[str, Any]:
        asked, looked = False, 0.0
        while True:
            with contextlib.suppress(queue.Empty):
                self._hear(*self._heard.get(timeout=LOOK_S))
            if time.monotonic() - looked < LOOK_S:
                continue  # there is always something to hear
            looked = time.monotonic()
            if self.stop.is_set() and not asked:
                asked = True
                self._signal(signal.SIGTERM)
            if self._over():
                return self._result()
            self._check()

    def _hear(self, rank: Rank, event: Event) -> None:
        now = rank.alive = time.monotonic()
        if event["type"] == "beat":
            if rank.limited:
                self._longest = max(self._longest, now - self._moved)
            self._moved, rank.limited = now, event["limited"]
        elif event["type"] in ("outcome", "fault"):
            rank.told = event
        elif event["type"] != "alive":
            self.attempt.forward(event)

    def _over(self) -> bool:
        """Whether all has been said: rank 0 ended well, every rank is gone, or one failed and all had time to say why."""
        if self._ended_well():
            return True
        if all(r.process.poll() is not None for r in self.ranks) and self._heard.empty():
            self._join()
            return self._heard.empty()
        if any(r.process.poll() or _failed(r) for r in self.ranks):
            self._failed = self._failed or time.monotonic()
        explained = any(_failed(r) for r in self.ranks)
        return self._failed > 0 and (explained or time.monotonic() - self._failed > EXPLAIN_S)

    def _result(self) -> dict[str, Any]:
        """What the run came to. An error that a rank can name counts before the loss of another rank."""
        told = self.ranks[0].told
        if told is not None and self._ended_well():
            if told["state"] == "CANCELLED":
                raise Cancelled("stopped; the checkpoint is kept", reason="STOPPED")
            return dict(told["result"])
        failed = sorted(
            (r for r in self.ranks if _failed(r)), key=lambda r: r.told["type"] == "fault" if r.told else True
        )
        if failed and failed[0].told is not None:
            raise _named(failed[0].number, failed[0].told)
        lost = [r for r in self.ranks if r.process.poll()]
        if lost:
            self.attempt.check()  # a rank that found another attempt at work says so by its status only
            raise Unavailable(_how_lost(lost), reason="RANK_LOST", metadata={"rank": str(lost[0].number)})
        if self.node > 0:
            return {}
        raise Unavailable("rank 0 ended without an outcome", reason="RANK_LOST", metadata={"rank": "0"})

    def _check(self) -> None:
        """DeadlineExceeded (RANK_HUNG)."""
        now = time.monotonic()
        at_work = [r for r in self.ranks if r.told is None and r.process.poll() is None]
        for rank in at_work:
            if now - rank.alive > (SILENT_S if self._longest else SILENT_START_S):
                raise DeadlineExceeded(
                    f"rank {rank.number} has given no sign of life for {now - rank.alive:.0f} s",
                    reason="RANK_HUNG",
                    metadata={"rank": str(rank.number)},
                )
        patience = max(STUCK_S, STUCK_TIMES * self._longest)
        if at_work and all(r.limited for r in at_work) and now - self._moved > patience:
            raise DeadlineExceeded(
                f"no rank of this machine has made progress for {now - self._moved:.0f} s; one of all ranks hangs",
                reason="RANK_HUNG",
            )

    def _end(self) -> None:
        deadline = time.monotonic() + (LAST_S if self._ended_well() else 0.0)
        while any(r.process.poll() is None for r in self.ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        for rank in self.ranks:
            rank.process.wait()
        self._join()

    def _join(self) -> None:
        """Ranks that are gone have said all, once the threads that listen have passed it on."""
        for thread in self._threads:
            thread.join(timeout=5.0)

    def _ended_well(self) -> bool:
        told = self.ranks[0].told if self.ranks else None
        return self.node == 0 and told is not None and told.get("state") in ("SUCCEEDED", "CANCELLED")

    def _signal(self, number: int) -> None:
        for rank in self.ranks:
            if rank.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, number)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _failed(rank: Rank) -> bool:
    return rank.told is not None and (rank.told["type"] == "fault" or rank.told["state"] == "FAILED")


def _named(number: int, told: Event) -> QuartetError:
    error = told["error"]
    return from_json({**error, "message": f"rank {number}: {error['message']}"} if number else error)


def _how_lost(lost: list[Rank]) -> str:
    """The ranks that were killed say more than those that fell over for want of them."""
    rank = min(lost, key=lambda r: (r.process.returncode > 0, r.number))
    status = rank.process.returncode
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    said = f"; it last said: {rank.last[-1]}" if rank.last else ""
    return f"rank {rank.number} {how}{said}"
