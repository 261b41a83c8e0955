"""What tests of jobs share: a launcher that starts the small worker, and supervisors that can be cut anywhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from services.common.jobs import Jobs
from services.common.launchers import ONE, Handle, Shape
from services.common.launchers.local import LocalLauncher
from services.common.records import Record, Records
from services.common.supervisor import Work
from services.common.wishes import TERMINAL
from services.finetune.progress import Event
from services.finetune.store import Store

WORKER = Path(__file__).with_name("worker.py")
ROOT = WORKER.parents[2]
NAME = "workspaces/w/trainingJobs/j"
Plan = list[list[Any]]
SIMPLE: Plan = [["events", 3], ["checkpoint", 4], ["events", 2], ["end"]]


class ScriptLauncher(LocalLauncher):
    """The local launcher, with tests/common/worker.py in the place of the library's worker."""

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str], shape: Shape = ONE) -> Handle:
        assert command[1:3] == ["-m", "services.finetune"]
        return super().launch(
            [sys.executable, str(WORKER), *command[3:]], name, {"PYTHONPATH": str(ROOT), **env}, shape
        )


def work(noticed: list[Event] | None = None) -> Work:
    def notice(job: Record, event: Event) -> Event:
        if noticed is not None:
            noticed.append(event)
        return event

    return Work(
        "trainingJob",
        "train",
        lambda job: {"plan": job.body["spec"]["plan"]},
        lambda job, result: {"result": dict(result)},
        notice,
        shape=lambda job: Shape(job.body["spec"].get("nodes", 1)),
    )


def make(url: str, store: Store, home: Path, **changes: Any) -> Jobs:
    """The jobs of a service that was just started: a new supervisor, a new launcher, a new connection."""
    given = {"max_workers": 2, "grace_s": 60.0, **changes}  # a loaded machine shall not be the one that kills
    room = given.pop("work", None) or work()
    return Jobs(Records(url), store, ScriptLauncher(home), room, **given)


def until(jobs: Jobs, name: str, done: Callable[[Record], bool], limit_s: float = 30) -> Record:
    """Tick until the job is so."""
    deadline = time.monotonic() + limit_s
    while not done(job := jobs.get(name)):
        assert time.monotonic() < deadline, (job, jobs.records.events(name, 0))
        jobs.supervisor.tick()
        time.sleep(0.02)
    return job


def ended(jobs: Jobs, name: str, limit_s: float = 30) -> Record:
    return until(jobs, name, lambda job: job.state in TERMINAL, limit_s)


def states(jobs: Jobs, name: str) -> list[str]:
    return [event["state"] for _, event in jobs.records.events(name, 0) if event["type"] == "state"]


def check_history(jobs: Jobs, name: str, last_attempt_said: int) -> None:
    """No gap, no duplicate, one terminal state at the end, and all that the last attempt said."""
    events = jobs.records.events(name, 0)
    assert [sequence for sequence, _ in events] == list(range(1, len(events) + 1))
    said = [(e["values"]["by"], e["values"]["said"]) for _, e in events if e["type"] == "metric"]
    assert len(set(said)) == len(said), "an event was told twice"
    assert said == sorted(said), "attempts are mixed, or events out of order"
    attempt = jobs.get(name).body["attempt"]
    assert [n for by, n in said if by == attempt] == list(range(1, last_attempt_said + 1))
    assert all(event["attempt"] == event["values"]["by"] for _, event in events if event["type"] == "metric")
    assert [state in TERMINAL for state in states(jobs, name)].count(True) == 1
    assert events[-1][1].get("state") in TERMINAL


def queue(jobs: Jobs, plan: Plan, name: str = NAME, request_id: str = "", nodes: int = 1) -> Record:
    return jobs.create(name, {"plan": plan, "nodes": nodes}, request_id, str(plan))


def handle_of(jobs: Jobs, name: str = NAME) -> dict[str, Any]:
    job = until(jobs, name, lambda job: job.body["handle"] is not None)
    handle: dict[str, Any] = job.body["handle"]
    return handle


def running(job: Record) -> bool:
    return job.state == "RUNNING"


def gone(jobs: Jobs, handle: dict[str, Any]) -> None:
    deadline = time.monotonic() + 10
    while jobs.supervisor.launcher.alive(handle):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Cut(BaseException):
    """kill -9, as far as one process can show it: nothing after it runs."""


def cut_at(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, number: int, before: bool) -> list[str]:
    """Make the supervisor die at its `number`-th act on the outside world: just before it, or just after."""
    acts: list[str] = []

    def watched(owner: object, method: str) -> None:
        real: Callable[..., Any] = getattr(owner, method)

        def act(*args: Any, **given: Any) -> Any:
            acts.append(method)
            if before and len(acts) == number:
                raise Cut
            done = real(*args, **given)
            if not before and len(acts) == number:
                raise Cut
            return done

        monkeypatch.setattr(owner, method, act, raising=True)

    watched(jobs.records, "update")
    watched(jobs.store, "put")
    watched(jobs.supervisor.launcher, "launch")
    watched(jobs.supervisor.launcher, "stop")
    return acts
