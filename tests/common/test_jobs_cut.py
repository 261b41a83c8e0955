"""Services cut anywhere, and two at once: no job is lost, and nothing is told twice."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from services.common.jobs import Jobs
from services.finetune import progress
from services.finetune.errors import (
    Unavailable,
)
from services.finetune.store import Store
from tests.common.jobbing import (
    NAME,
    SIMPLE,
    Cut,
    check_history,
    cut_at,
    ended,
    gone,
    handle_of,
    make,
    queue,
    running,
    until,
)

# ---------------------------------------------------------------------------------------------- cut supervisors


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 11))
def test_cut_at_every_act(
    number: int, before: bool, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PREPARING, lease, order, launch, handle, each ingested segment, the end: cut at each, it succeeds, once."""
    from services.finetune.store import open_store

    uri = (tmp_path / "store").as_uri()
    first = make(sqlite_url, open_store(uri), tmp_path)
    queue(first, SIMPLE)
    with monkeypatch.context() as patch:
        acts = cut_at(first, patch, number, before)
        try:
            ended(first, NAME)
        except Cut:
            assert len(acts) == number
    first.records.close()
    second = make(sqlite_url, open_store(uri), tmp_path)
    assert ended(second, NAME).state == "SUCCEEDED"
    check_history(second, NAME, 5)
    checkpoints = [e["step"] for _, e in second.records.events(NAME, 0) if e["type"] == "checkpoint"]
    assert set(checkpoints) == {4}
    assert second.get(NAME).body["attempt"] <= 2
    second.records.close()


def test_cuts_reach_the_end(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers above cover all acts of an uncut supervisor."""
    acts = cut_at(jobs, monkeypatch, 10_000, True)
    queue(jobs, SIMPLE)
    ended(jobs, NAME)
    assert len(acts) <= 10, acts


def test_live_worker_is_taken_over_by_its_handle(
    jobs: Jobs, sqlite_url: str, file_store: Store, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    queue(jobs, [["events", 2], ["wait", str(go)], ["events", 3], ["end"]])
    until(jobs, NAME, running)
    handle = handle_of(jobs)
    jobs.records.close()
    next_jobs = make(sqlite_url, file_store, tmp_path)
    for _ in range(5):
        next_jobs.supervisor.tick()
    assert next_jobs.get(NAME).body["handle"] == handle
    go.touch()
    job = ended(next_jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 1)
    check_history(next_jobs, NAME, 5)


def cut_after_launch(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    real = jobs.supervisor.launcher.launch

    def launch(*args: Any) -> Any:
        real(*args)
        raise Cut

    monkeypatch.setattr(jobs.supervisor.launcher, "launch", launch)
    with pytest.raises(Cut):
        jobs.supervisor.tick()


def test_live_worker_is_taken_over_by_its_claim(
    jobs: Jobs, sqlite_url: str, file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(jobs, [["events", 2], ["wait", str(tmp_path / "go")], ["events", 3], ["end"]])
    cut_after_launch(jobs, monkeypatch)
    deadline = time.monotonic() + 10
    while (claim := progress.read_claim(file_store, jobs.get(NAME).body["key"], 1)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    next_jobs = make(sqlite_url, file_store, tmp_path)
    assert until(next_jobs, NAME, running).body["handle"]["pid"] == claim["pid"]
    (tmp_path / "go").touch()
    job = ended(next_jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 1)
    check_history(next_jobs, NAME, 5)


def test_late_worker_is_fenced(
    jobs: Jobs, sqlite_url: str, file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that had not claimed when the service came back finds itself shut out."""
    queue(jobs, [["unclaimed", 1, str(tmp_path / "go")], ["events", 3], ["end"]])
    cut_after_launch(jobs, monkeypatch)
    next_jobs = make(sqlite_url, file_store, tmp_path)
    job = ended(next_jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 2)
    (tmp_path / "go").touch()
    late = tmp_path / "logs" / f"{job.body['key'].removeprefix('jobs/')}-1.log"
    deadline = time.monotonic() + 10
    while "fenced" not in late.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert progress.read_claim(file_store, job.body["key"], 1) is None
    check_history(next_jobs, NAME, 3)


def test_success_in_a_gap_of_service_is_found(
    jobs: Jobs, sqlite_url: str, file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Believed lost, it ends well while no supervisor looks: its last events and checkpoint count."""
    go = tmp_path / "go"
    queue(jobs, [["events", 2], ["wait", str(go)], ["checkpoint", 7], ["end"]])
    job = until(jobs, NAME, lambda job: running(job) and job.body["handle"] is not None)
    handle = job.body["handle"]
    jobs.supervisor._move(job, "QUEUED", "believed lost")
    go.touch()
    gone(jobs, handle)
    next_jobs = make(sqlite_url, file_store, tmp_path)
    job = ended(next_jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["result"]["step"]) == ("SUCCEEDED", 1, 7)
    assert [e["step"] for _, e in next_jobs.records.events(NAME, 0) if e["type"] == "checkpoint"] == [7]
    check_history(next_jobs, NAME, 2)


def test_cancel_survives_the_service(jobs: Jobs, sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    queue(jobs, [["events", 2], ["sleep", 60], ["end"]])
    until(jobs, NAME, running)
    jobs.cancel(NAME)
    next_jobs = make(sqlite_url, file_store, tmp_path)
    assert ended(next_jobs, NAME).state == "CANCELLED"


def test_two_supervisors_at_once(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    """As while one service replaces another: attempts may be wasted, nothing is told twice."""
    both = [make(sqlite_url, file_store, tmp_path) for _ in range(2)]
    queue(both[0], [["events", 3], ["sleep", 0.3], ["events", 2], ["end"]])
    for jobs in both:
        jobs.start()
    try:
        deadline = time.monotonic() + 30
        while both[0].get(NAME).state != "SUCCEEDED":
            assert time.monotonic() < deadline, both[0].get(NAME)
            time.sleep(0.05)
    finally:
        for jobs in both:
            jobs.stop()
    check_history(both[0], NAME, 5)


def test_store_away_for_a_while(
    jobs: Jobs, file_store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    queue(jobs, SIMPLE)

    def away(*_: Any, **__: Any) -> Any:
        raise Unavailable("the store does not answer", reason="STORE_UNREACHABLE")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.store, "get", away)
        for _ in range(5):
            with pytest.raises(Unavailable):
                jobs.supervisor.tick()
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 1)
