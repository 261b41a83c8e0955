"""The life of a job: real workers (tests/common/worker.py), real databases, supervisors cut anywhere."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from services.common import wire
from services.common.jobs import Jobs
from services.common.records import Record, Records
from services.common.supervisor import Work
from services.finetune import progress
from services.finetune.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    OutOfRange,
    QuartetError,
)
from services.finetune.store import Store
from tests.common.jobbing import (
    NAME,
    SIMPLE,
    ScriptLauncher,
    check_history,
    ended,
    gone,
    handle_of,
    make,
    queue,
    running,
    states,
    until,
    work,
)

# ---------------------------------------------------------------------------------------------- the plain life


def test_whole_life(database_url: str, store: Store, tmp_path: Path) -> None:
    """On every database and every store."""
    noticed: list[progress.Event] = []
    jobs = make(database_url, store, tmp_path, work=work(noticed))
    assert queue(jobs, SIMPLE).state == "QUEUED"
    job = ended(jobs, NAME)
    assert job.state == "SUCCEEDED" and job.body["result"]["step"] == 4
    assert states(jobs, NAME) == ["QUEUED", "PREPARING", "RUNNING", "SUCCEEDED"]
    check_history(jobs, NAME, 5)
    assert [e["type"] for e in noticed] == ["metric"] * 3 + ["checkpoint"] + ["metric"] * 2
    assert job.body["start_time"] <= job.body["end_time"]
    assert job.body["progress"] == {"step": 5, "loss": 1.0, "total_steps": 9, "eta_s": 1.0}
    jobs.records.close()


def test_request_id(jobs: Jobs) -> None:
    made = queue(jobs, SIMPLE, request_id="id")
    assert queue(jobs, SIMPLE, NAME + "2", request_id="id") == made
    with pytest.raises(QuartetError) as caught:
        queue(jobs, [["end"]], NAME + "3", request_id="id")
    assert caught.value.reason == "REQUEST_ID_REUSED"
    with pytest.raises(AlreadyExists) as taken:
        queue(jobs, SIMPLE)
    assert taken.value.reason == "JOB_EXISTS"
    ended(jobs, NAME)
    assert queue(jobs, SIMPLE, NAME, request_id="id").state == "SUCCEEDED"


def test_users_fault_ends_it_at_once(jobs: Jobs) -> None:
    queue(jobs, [["events", 1], ["fail", "DATASET_EMPTY"]])
    job = ended(jobs, NAME)
    assert (job.state, job.body["error"]["reason"], job.body["attempt"]) == ("FAILED", "DATASET_EMPTY", 1)
    check_history(jobs, NAME, 1)


def test_get_and_delete(jobs: Jobs, sqlite_url: str) -> None:
    with pytest.raises(NotFound):
        jobs.get(NAME)
    queue(jobs, SIMPLE)
    with pytest.raises(FailedPrecondition) as caught:
        jobs.delete(NAME, "")
    assert caught.value.reason == "JOB_NOT_ENDED"
    job = ended(jobs, NAME)
    forgotten: list[int] = []
    with pytest.raises(QuartetError) as stale:
        jobs.delete(NAME, "1", lambda: forgotten.append(1))
    assert stale.value.reason == "ETAG_MISMATCH" and not forgotten
    jobs.delete(NAME, job.etag, lambda: forgotten.append(1))
    assert forgotten and jobs.records.events(NAME, 0) == []
    # The name is free again, and the new job does not meet the old one's outcome.
    queue(jobs, [["events", 1], ["fail", "X"]])
    assert ended(jobs, NAME).state == "FAILED"


def test_limit_on_workers(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    jobs = make(sqlite_url, file_store, tmp_path, max_workers=2)
    go = tmp_path / "go"
    names = [f"{NAME}{n}" for n in range(4)]
    for name in names:
        queue(jobs, [["events", 1], ["wait", str(go)], ["end"]], name)
    until(jobs, names[1], running)
    for _ in range(5):
        jobs.supervisor.tick()
    assert [jobs.get(name).state for name in names] == ["RUNNING", "RUNNING", "QUEUED", "QUEUED"]
    go.touch()
    assert [ended(jobs, name).state for name in names] == ["SUCCEEDED"] * 4


# ---------------------------------------------------------------------------------------------- cancelling


def test_cancel_while_queued(jobs: Jobs) -> None:
    queue(jobs, SIMPLE)
    jobs.cancel(NAME)
    jobs.supervisor.tick()
    assert jobs.get(NAME).state == "CANCELLED"
    assert states(jobs, NAME) == ["QUEUED", "CANCELLED"]


def test_cancel_while_running(jobs: Jobs) -> None:
    queue(jobs, [["events", 2], ["sleep", 60], ["end"]])
    until(jobs, NAME, running)
    jobs.cancel(NAME)
    jobs.cancel(NAME)
    assert ended(jobs, NAME).state == "CANCELLED"
    assert jobs.cancel(NAME).state == "CANCELLED"
    check_history(jobs, NAME, 2)


def test_cancel_kills_a_deaf_worker(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    jobs = make(sqlite_url, file_store, tmp_path, grace_s=0.4)
    queue(jobs, [["deaf"], ["events", 2], ["wait", "/no/such/file"], ["end"]])
    until(jobs, NAME, running)
    handle = handle_of(jobs)
    jobs.cancel(NAME)
    assert ended(jobs, NAME, 10).state == "CANCELLED"
    assert not jobs.supervisor.launcher.alive(handle)


def test_success_before_the_cancel_stays(jobs: Jobs) -> None:
    queue(jobs, SIMPLE)
    gone(jobs, handle_of(jobs))  # it has published, and no tick has seen it
    jobs.cancel(NAME)
    assert ended(jobs, NAME).state == "SUCCEEDED"


def test_unseen_success_of_a_job_that_waits_stays(jobs: Jobs, tmp_path: Path) -> None:
    """The service believed the worker lost, but it only came late; then somebody cancels."""
    queue(jobs, SIMPLE)
    handle = handle_of(jobs)
    gone(jobs, handle)
    job = jobs.get(NAME)
    jobs.supervisor._move(job, "QUEUED", "believed lost")
    jobs.cancel(NAME)
    jobs.supervisor.tick()
    assert jobs.get(NAME).state == "SUCCEEDED"
    check_history(jobs, NAME, 5)


def test_sigterm_of_somebody_else_is_no_cancel(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(jobs, [["events", 1], ["only", 1, "sleep", 60], ["events", 1], ["end"]])
    until(jobs, NAME, running)
    os.kill(handle_of(jobs)["pid"], signal.SIGTERM)
    until(jobs, NAME, lambda job: job.state == "QUEUED")
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 2)
    check_history(jobs, NAME, 2)


# ---------------------------------------------------------------------------------------------- lost workers


def test_lost_worker_is_replaced(jobs: Jobs) -> None:
    queue(jobs, [["events", 2], ["only", 1, "die"], ["events", 2], ["end"]])
    job = until(jobs, NAME, lambda job: job.body.get("lost") == 1)
    assert job.state == "QUEUED" and 1.0 < job.body["not_before"] - time.time() <= 2.0
    jobs.supervisor.tick()
    assert jobs.get(NAME).state == "QUEUED", "the pause was not kept"
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 2)
    check_history(jobs, NAME, 4)


def test_what_every_attempt_complained_of_is_the_jobs_error(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(jobs, [["events", 1], ["complain"]])
    monkeypatch.setattr("services.common.supervisor.time.time", itertools.count(time.time(), 60).__next__)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("FAILED", 3)
    assert (job.body["error"]["code"], job.body["error"]["reason"]) == ("UNAVAILABLE", "HUB_UNREACHABLE")
    told = [e["message"] for _, e in jobs.records.events(NAME, 0) if e["type"] == "state"]
    assert "attempt 1 ended: nobody answers there" in told


def test_lost_too_often(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    queue(jobs, [["events", 1], ["die"]])
    skipped = 0.0
    real = time.time
    monkeypatch.setattr("services.common.supervisor.time.time", lambda: real() + skipped)
    pauses = []
    for lost in (1, 2):
        job = until(jobs, NAME, lambda job, lost=lost: job.body.get("lost") == lost)  # type: ignore[misc]
        pauses.append(round(job.body["not_before"] - time.time()))
        skipped += 60
    job = ended(jobs, NAME)
    assert pauses == [2, 4]
    assert (job.state, job.body["attempt"], job.body["error"]["reason"]) == ("FAILED", 3, "WORKER_LOST")
    assert "a last word" in job.body["error"]["message"]
    check_history(jobs, NAME, 1)


def test_worker_that_cannot_be_started(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    jobs = make(sqlite_url, file_store, tmp_path)
    blocked = tmp_path / "logs"
    blocked.write_text("a file where the folder of logs should be")
    queue(jobs, SIMPLE)
    jobs.supervisor.tick()
    assert jobs.get(NAME).body["lost"] == 1
    blocked.unlink()
    assert ended(jobs, NAME).state == "SUCCEEDED"


def test_one_jobs_fault_does_not_stop_others(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    def succeed(job: Record, result: Mapping[str, Any]) -> Mapping[str, Any]:
        if job.name.endswith("bad"):
            raise ZeroDivisionError("a defect")
        if job.name.endswith("taken"):
            raise AlreadyExists("that name is taken", reason="MODEL_EXISTS")
        return {}

    room = Work("trainingJob", "train", lambda job: {"plan": job.body["spec"]["plan"]}, succeed)
    jobs = make(sqlite_url, file_store, tmp_path, work=room, max_workers=3)
    for name in ("bad", "taken", "good"):
        queue(jobs, SIMPLE, NAME + name)
    found = {name: ended(jobs, NAME + name) for name in ("good", "taken", "bad")}
    assert [job.state for job in found.values()] == ["SUCCEEDED", "FAILED", "FAILED"]
    assert found["taken"].body["error"]["reason"] == "MODEL_EXISTS"
    assert found["bad"].body["error"]["reason"] == "INTERNAL"
    assert "defect" in found["bad"].body["error"]["message"] and "Zero" not in found["bad"].body["error"]["message"]


# ---------------------------------------------------------------------------------------------- watching


def test_watch_is_visible_in_order_and_ends(jobs: Jobs) -> None:
    queue(jobs, SIMPLE)
    jobs.start()
    try:

        async def all_events(after: int) -> list[int]:
            return [sequence async for sequence, _ in wire.follow(jobs.watch(NAME, after))]

        seen = asyncio.run(asyncio.wait_for(all_events(0), 20))
        assert seen == list(range(1, len(seen) + 1))
        assert asyncio.run(all_events(4)) == seen[4:]
        assert asyncio.run(all_events(len(seen))) == []
    finally:
        jobs.stop()


@pytest.mark.parametrize("after", [2, 99, -1, 2**62])
def test_watch_from_an_unknown_sequence(jobs: Jobs, after: int) -> None:
    queue(jobs, SIMPLE)
    with pytest.raises(OutOfRange) as caught:
        next(jobs.watch(NAME, after))
    assert caught.value.reason == "SEQUENCE_UNKNOWN"


def test_watch_of_no_job(jobs: Jobs) -> None:
    with pytest.raises(NotFound):
        next(jobs.watch(NAME, 0))


def test_checkpoint_has_its_name_before_it_is_seen(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    order: list[str] = []

    def notice(job: Record, event: progress.Event) -> progress.Event:
        if event["type"] == "checkpoint":
            told = [e["type"] for _, e in Records(sqlite_url).events(NAME, 0)]
            assert "checkpoint" not in told
            order.append("named")
            return {**event, "name": "x"}
        return event

    room = Work("trainingJob", "train", lambda job: {"plan": job.body["spec"]["plan"]}, lambda job, r: r, notice)
    jobs = Jobs(Records(sqlite_url), file_store, ScriptLauncher(tmp_path), room, max_workers=1, grace_s=1)
    queue(jobs, SIMPLE)
    ended(jobs, NAME)
    assert order == ["named"]
    assert [e["name"] for _, e in jobs.records.events(NAME, 0) if e["type"] == "checkpoint"] == ["x"]


def test_a_database_older_than_the_store_goes_on_from_there(jobs: Jobs, file_store: Store) -> None:
    """It was brought back from a backup that was made before the later attempts."""
    queue(jobs, SIMPLE)
    lease = f"{jobs.get(NAME).body['key']}/lease.json"
    file_store.put(lease, progress.dump({"attempt": 5, "outcome": None}))
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 6)
    check_history(jobs, NAME, 5)
