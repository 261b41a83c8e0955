"""Pausing and resuming: real workers, from every state, with the service cut at every act of it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from services.common import wishes
from services.common.jobs import Jobs
from services.common.records import Record
from services.finetune import progress
from services.finetune.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from services.finetune.store import Store, open_store
from tests.common.jobbing import (
    NAME,
    SIMPLE,
    Cut,
    Plan,
    check_history,
    cut_at,
    ended,
    gone,
    handle_of,
    make,
    queue,
    running,
    states,
    until,
)

LONG: Plan = [["events", 2], ["checkpoint", 4], ["only", 1, "sleep", 60], ["events", 2], ["end"]]


def paused(job: Record) -> bool:
    return job.state == "PAUSED"


def last_message(jobs: Jobs) -> str:
    told = [event["message"] for _, event in jobs.records.events(NAME, 0) if event["type"] == "state"]
    return str(told[-1])


def test_pause_frees_the_place_and_resume_goes_on(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    jobs = make(sqlite_url, file_store, tmp_path, max_workers=1)
    queue(jobs, LONG)
    until(jobs, NAME, running)
    handle = handle_of(jobs)
    queue(jobs, SIMPLE, NAME + "2")
    assert jobs.ask(NAME, wishes.pause).state == "RUNNING"
    until(jobs, NAME, paused)
    assert not jobs.supervisor.launcher.alive(handle), "its place is not free"
    assert "after step 4" in last_message(jobs)
    assert ended(jobs, NAME + "2").state == "SUCCEEDED"
    assert jobs.get(NAME).state == "PAUSED" and jobs.get(NAME).body.get("end_time") is None
    assert jobs.ask(NAME, wishes.resume).state == "QUEUED"
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 2)
    assert progress.newest_checkpoint(file_store, job.body["key"], 2) == (4, f"sha256:{4:064d}")
    shown = [s for s in states(jobs, NAME) if s not in ("PREPARING", "RUNNING")]
    assert shown == ["QUEUED", "PAUSED", "QUEUED", "SUCCEEDED"]
    check_history(jobs, NAME, 4)


def test_pause_while_queued_takes_no_place(jobs: Jobs) -> None:
    queue(jobs, SIMPLE)
    jobs.ask(NAME, wishes.pause)
    until(jobs, NAME, paused)
    for _ in range(3):
        jobs.supervisor.tick()
    assert states(jobs, NAME) == ["QUEUED", "PAUSED"] and jobs.get(NAME).body["attempt"] == 0
    assert "nothing is saved yet" in last_message(jobs)
    jobs.ask(NAME, wishes.resume)
    assert ended(jobs, NAME).body["attempt"] == 1


def test_pause_between_two_tries_gives_fresh_ones(jobs: Jobs) -> None:
    queue(jobs, [["events", 1], ["only", 1, "die"], ["events", 1], ["end"]])
    until(jobs, NAME, lambda job: job.body.get("lost") == 1)
    jobs.ask(NAME, wishes.pause)
    until(jobs, NAME, paused)
    job = jobs.ask(NAME, wishes.resume)
    assert (job.body["lost"], job.body["not_before"]) == (0, 0)
    assert ended(jobs, NAME).state == "SUCCEEDED"


def test_pause_of_a_worker_that_dies_meanwhile(jobs: Jobs) -> None:
    queue(jobs, [["events", 1], ["only", 1, "die"], ["events", 1], ["end"]])
    gone(jobs, handle_of(jobs))
    jobs.ask(NAME, wishes.pause)
    assert until(jobs, NAME, paused).body.get("lost", 0) == 0
    jobs.ask(NAME, wishes.resume)
    assert ended(jobs, NAME).state == "SUCCEEDED"


def test_pause_kills_a_deaf_worker(sqlite_url: str, file_store: Store, tmp_path: Path) -> None:
    jobs = make(sqlite_url, file_store, tmp_path, grace_s=0.4)
    queue(jobs, [["only", 1, "deaf"], ["events", 1], ["only", 1, "wait", "/no/such/file"], ["end"]])
    until(jobs, NAME, running)
    handle = handle_of(jobs)
    jobs.ask(NAME, wishes.pause)
    until(jobs, NAME, paused)
    assert not jobs.supervisor.launcher.alive(handle)
    jobs.ask(NAME, wishes.resume)
    assert ended(jobs, NAME).state == "SUCCEEDED"


def test_twice_is_harmless(jobs: Jobs) -> None:
    queue(jobs, LONG)
    assert jobs.ask(NAME, wishes.resume).state == "QUEUED", "resuming what is not paused changes nothing"
    until(jobs, NAME, running)
    jobs.ask(NAME, wishes.pause)
    jobs.ask(NAME, wishes.pause)
    job = until(jobs, NAME, paused)
    assert jobs.ask(NAME, wishes.pause) == job
    jobs.ask(NAME, wishes.resume)
    jobs.ask(NAME, wishes.resume)
    assert ended(jobs, NAME).state == "SUCCEEDED"
    assert states(jobs, NAME).count("PAUSED") == 1


def test_resume_before_the_worker_is_gone(jobs: Jobs) -> None:
    """The signal is out already: the worker leaves, and another attempt follows without being paused, or blamed."""
    queue(jobs, LONG)
    until(jobs, NAME, running)
    jobs.ask(NAME, wishes.pause)
    jobs.supervisor.tick()
    jobs.ask(NAME, wishes.resume)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body.get("lost", 0)) == ("SUCCEEDED", 2, 0)
    assert "PAUSED" not in states(jobs, NAME)


def test_what_ended_before_stays_ended(jobs: Jobs) -> None:
    queue(jobs, SIMPLE)
    gone(jobs, handle_of(jobs))  # it has published, and no tick has seen it
    jobs.ask(NAME, wishes.pause)
    assert ended(jobs, NAME).state == "SUCCEEDED"
    for wish in (wishes.pause, wishes.resume):
        with pytest.raises(FailedPrecondition) as caught:
            jobs.ask(NAME, wish)
        assert caught.value.reason == "JOB_ENDED"
    queue(jobs, [["events", 1], ["fail", "DATASET_EMPTY"]], NAME + "2")
    gone(jobs, handle_of(jobs, NAME + "2"))
    jobs.ask(NAME + "2", wishes.pause)
    assert ended(jobs, NAME + "2").body["error"]["reason"] == "DATASET_EMPTY"


def test_cancel_of_a_paused_job(jobs: Jobs) -> None:
    queue(jobs, LONG)
    until(jobs, NAME, running)
    jobs.ask(NAME, wishes.pause)
    until(jobs, NAME, paused)
    jobs.cancel(NAME)
    with pytest.raises(FailedPrecondition):
        jobs.ask(NAME, wishes.resume)
    assert ended(jobs, NAME).state == "CANCELLED"
    check_history(jobs, NAME, 2)


def test_cancel_of_a_job_that_is_being_paused(jobs: Jobs) -> None:
    queue(jobs, LONG)
    until(jobs, NAME, running)
    jobs.ask(NAME, wishes.pause)
    jobs.supervisor.tick()
    jobs.cancel(NAME)
    assert ended(jobs, NAME).state == "CANCELLED"
    assert "PAUSED" not in states(jobs, NAME)


def test_delete_of_a_paused_job(jobs: Jobs) -> None:
    queue(jobs, SIMPLE)
    jobs.ask(NAME, wishes.pause)
    with pytest.raises(FailedPrecondition):
        jobs.delete(NAME, "")
    job = until(jobs, NAME, paused)
    with pytest.raises(Aborted):
        jobs.delete(NAME, "1")
    seen: list[str] = []
    jobs.delete(NAME, job.etag, lambda: seen.append(jobs.get(NAME).state))
    assert seen == ["CANCELLED"], "it could be resumed while it is forgotten"
    with pytest.raises(NotFound):
        jobs.get(NAME)


def test_a_request_is_fulfilled_once(jobs: Jobs) -> None:
    """A pause that comes again after the resume, as a client's retry may, pauses nothing."""
    queue(jobs, SIMPLE)
    pause, resume = wishes.once(wishes.pause, "p", "pause j"), wishes.once(wishes.resume, "r", "resume j")
    jobs.ask(NAME, pause)
    until(jobs, NAME, paused)
    jobs.ask(NAME, resume)
    assert not wishes.pausing(jobs.ask(NAME, pause))
    with pytest.raises(InvalidArgument) as caught:
        jobs.ask(NAME, wishes.once(wishes.pause, "r", "pause j"))
    assert caught.value.reason == "REQUEST_ID_REUSED"
    jobs.ask(NAME, wishes.pause)
    until(jobs, NAME, paused)
    assert jobs.ask(NAME, resume).state == "PAUSED"
    jobs.ask(NAME, wishes.resume)
    assert ended(jobs, NAME).state == "SUCCEEDED"
    assert len(jobs.get(NAME).body["requests"]) == 2


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("number", range(1, 6))
def test_cut_at_every_act_of_pausing(
    number: int, before: bool, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal, the last segment, reopening the lease, raising the fence, PAUSED: cut at each, it pauses and goes on."""
    uri = (tmp_path / "store").as_uri()
    first = make(sqlite_url, open_store(uri), tmp_path)
    queue(first, LONG)
    until(first, NAME, lambda job: running(job) and job.body["handle"] is not None and job.body["cursor"] >= 1)
    first.ask(NAME, wishes.pause)
    with monkeypatch.context() as patch:
        acts = cut_at(first, patch, number, before)
        try:
            until(first, NAME, paused)
        except Cut:
            assert len(acts) == number
    first.records.close()
    second = make(sqlite_url, open_store(uri), tmp_path)
    until(second, NAME, paused)
    second.ask(NAME, wishes.resume)
    job = ended(second, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 2)
    assert states(second, NAME).count("PAUSED") == 1
    check_history(second, NAME, 4)
    second.records.close()


def test_cuts_reach_paused(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers above cover all acts of an uncut supervisor."""
    queue(jobs, LONG)
    until(jobs, NAME, lambda job: running(job) and job.body["handle"] is not None and job.body["cursor"] >= 1)
    jobs.ask(NAME, wishes.pause)
    acts = cut_at(jobs, monkeypatch, 10_000, True)
    until(jobs, NAME, paused)
    assert len(acts) <= 5, acts


@pytest.mark.parametrize("number", range(1, 6))
def test_cut_at_every_act_of_resuming(
    number: int, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = (tmp_path / "store").as_uri()
    first = make(sqlite_url, open_store(uri), tmp_path)
    queue(first, LONG)
    until(first, NAME, running)
    first.ask(NAME, wishes.pause)
    until(first, NAME, paused)
    with monkeypatch.context() as patch:
        cut_at(first, patch, number, before=False)
        try:
            first.ask(NAME, wishes.once(wishes.resume, "r", "resume"))
            ended(first, NAME)
        except Cut:
            pass
    first.records.close()
    second = make(sqlite_url, open_store(uri), tmp_path)
    second.ask(NAME, wishes.once(wishes.resume, "r", "resume"))  # as a client does that got no answer
    assert ended(second, NAME).state == "SUCCEEDED"
    assert states(second, NAME).count("PAUSED") == 1
    check_history(second, NAME, 4)
    second.records.close()


def test_a_zombie_of_a_paused_job_is_shut_out(jobs: Jobs, file_store: Store, tmp_path: Path) -> None:
    """A worker that is believed gone cannot end a job that was paused since."""
    go = tmp_path / "go"
    queue(jobs, [["events", 1], ["only", 1, "wait", str(go)], ["end"]])
    job = until(jobs, NAME, lambda job: running(job) and job.body["handle"] is not None)
    handle = job.body["handle"]
    jobs.supervisor._move(job, "QUEUED", "believed lost")
    jobs.ask(NAME, wishes.pause)
    until(jobs, NAME, paused)
    go.touch()
    gone(jobs, handle)
    assert progress.read_outcome(file_store, job.body["key"]) is None
    log = tmp_path / "logs" / f"{job.body['key'].removeprefix('jobs/')}-1.log"
    deadline = time.monotonic() + 10
    while "fenced" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    jobs.supervisor.tick()
    assert jobs.get(NAME).state == "PAUSED"
