"""The leader of a node's ranks, over small processes in their place: what it passes on, and whom it ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.finetune.config import ParallelConfig
from services.finetune.errors import (
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    QuartetError,
    Unavailable,
)
from services.finetune.progress import Attempt, raise_fence, read_segments
from services.finetune.store import Store
from services.finetune.train import leader, ranks
from services.finetune.train.leader import Leader

RANK = """
import os, signal, sys, time
from services.finetune.errors import InvalidArgument
from services.finetune.train import ranks
line, own = ranks.open_line(os.environ), ranks.place(os.environ)
def beat(): line.send({"type": "beat", "limited": True})
def log(text): line.send({"time": 0.0, "type": "log", "level": "info", "text": text})
def end(state, error=None): line.send({"type": "outcome", "state": state, "result": {"world": own.world}, "error": error})
"""


@pytest.fixture()
def attempt(file_store: Store) -> Iterator[Attempt]:
    raise_fence(file_store, "jobs/j", 1)
    with Attempt(file_store, "jobs/j", 1) as attempt:
        attempt.claim({})
        yield attempt


def lead(attempt: Attempt, script: str, local: int = 3, stop: threading.Event | None = None) -> dict[str, Any]:
    return Leader(attempt, stop or threading.Event(), local, [sys.executable, "-c", RANK + script]).run()


def texts(attempt: Attempt) -> list[str]:
    attempt.flush()
    events = [e for _, segment in read_segments(attempt.store, attempt.job_key, 1, -1) for e in segment]
    return [e["text"] for e in events]


def test_rank_0_speaks_and_the_others_are_waited_for(attempt: Attempt, tmp_path: Path) -> None:
    script = f"""
if own.rank == 0:
    log("hello")
    end("SUCCEEDED")
else:
    time.sleep(0.5)
    open({str(tmp_path)!r} + f"/{{own.rank}}", "w").close()
"""
    assert lead(attempt, script) == {"world": 3}
    assert sorted(p.name for p in tmp_path.glob("[0-9]")) == ["1", "2"]
    assert texts(attempt) == ["training in 3 processes", "hello"]


def test_what_a_rank_prints_is_told_with_its_number(attempt: Attempt, capfd: pytest.CaptureFixture[str]) -> None:
    lead(attempt, "print('here I am'); sys.stdout.flush(); time.sleep(0.3); own.rank or end('SUCCEEDED')")
    told = capfd.readouterr().err.splitlines()
    assert sorted(told) == [f"rank {n}: here I am" for n in range(3)]


def test_an_error_that_a_rank_can_name_counts_before_the_loss_of_its_neighbours(attempt: Attempt) -> None:
    script = """
if own.rank == 1:
    sys.exit("the connection was closed")
if own.rank == 2:
    time.sleep(0.5)
    end("FAILED", InvalidArgument("bad rows", reason="DATASET_EMPTY").to_json())
time.sleep(600)
"""
    with pytest.raises(InvalidArgument, match="rank 2: bad rows") as error:
        lead(attempt, script)
    assert error.value.reason == "DATASET_EMPTY"


def lost(attempt: Attempt, script: str, kind: type[QuartetError], reason: str) -> QuartetError:
    with pytest.raises(kind) as error:
        lead(attempt, script)
    assert error.value.reason == reason and error.value.retryable
    return error.value


def test_a_dead_rank_ends_all(attempt: Attempt, tmp_path: Path) -> None:
    script = f"""
open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w").close()
if own.rank == 1:
    print("about to die", flush=True)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
while True:
    beat()
    time.sleep(0.05)
"""
    error = lost(attempt, script, Unavailable, "RANK_LOST")
    assert error.message == "rank 1 was killed by SIGKILL; it last said: about to die"
    pids = [int(p.name) for p in tmp_path.glob("[0-9]*")]
    assert len(pids) == 3 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_stopped_rank_is_found(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "SILENT_S", 3.0)
    script = """
for _ in range(10):
    beat()
    time.sleep(0.05)
if own.rank == 2:
    os.kill(os.getpid(), signal.SIGSTOP)
while True:
    beat()
    time.sleep(0.05)
"""
    assert lost(attempt, script, DeadlineExceeded, "RANK_HUNG").metadata == {"rank": "2"}


def test_ranks_that_wait_for_one_that_hangs_are_found(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "STUCK_S", 1.0)
    script = """
for _ in range(10):
    beat()
    time.sleep(0.05)
time.sleep(600)
"""
    assert "no rank of this machine has made progress" in lost(attempt, script, DeadlineExceeded, "RANK_HUNG").message


def test_what_may_take_any_time_is_waited_for(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader, "STUCK_S", 0.5)
    script = """
beat(); beat()
if own.rank == 0:
    line.send({"type": "beat", "limited": False})
    time.sleep(4)
    end("SUCCEEDED")
time.sleep(5)
"""
    assert lead(attempt, script) == {"world": 3}


def test_sigterm_reaches_every_rank_once_and_rank_0_ends_the_run(attempt: Attempt) -> None:
    stop = threading.Event()
    script = """
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
log(f"ready {own.rank}")
while not asked:
    time.sleep(0.05)
time.sleep(0.5)
log(f"asked {len(asked)}")
if own.rank == 0:
    time.sleep(0.5)
    end("CANCELLED")
"""

    def ask() -> None:
        while sum(t.startswith("ready") for t in texts(attempt)) < 3:
            time.sleep(0.1)
        stop.set()

    asker = threading.Thread(target=ask)
    asker.start()
    with pytest.raises(Cancelled):
        lead(attempt, script, stop=stop)
    asker.join()
    assert texts(attempt).count("asked 1") == 3


def test_ranks_end_with_their_leader(tmp_path: Path) -> None:
    """Also one that is stopped."""
    rank = RANK + f"open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close()\nos.kill(os.getpid(), signal.SIGSTOP)"
    script = f"""
import sys, threading
from pathlib import Path
from services.finetune.progress import Attempt
from services.finetune.store import open_store
from services.finetune.train.leader import Leader
attempt = Attempt(open_store({(tmp_path / "store").as_uri()!r}), "jobs/j", 1)
Leader(attempt, threading.Event(), 2, [sys.executable, "-c", {rank!r}]).run()
"""
    import subprocess

    with subprocess.Popen([sys.executable, "-c", script]) as process:
        while len(pids := [int(p.name) for p in tmp_path.glob("[0-9]*")]) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(ranks_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ranks_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("environ", "follows", "node"),
    [
        ({}, False, (0, 1)),
        ({"NODE_RANK": "1", "NNODES": "2"}, True, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "4", "NODE_RANK": "0", "NNODES": "2"}, False, (0, 2)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, True, (0, 1)),
    ],
)
def test_the_environment_says_who_speaks(environ: dict[str, str], follows: bool, node: tuple[int, int]) -> None:
    assert (ranks.follows(environ), ranks.node(environ)) == (follows, node)


def test_as_many_machines_as_the_config_says() -> None:
    config = ParallelConfig(processes=2, nodes=2)
    assert ranks.wanted(config, {"NNODES": "2", "NODE_RANK": "1"}) == 2
    with pytest.raises(FailedPrecondition, match="started on 1 machines"):
        ranks.wanted(config, {})
