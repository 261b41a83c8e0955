"""The life of a job through each launcher: real workers (tests/common/worker.py), processes here and pods there."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from services.common import wishes
from services.common.jobs import Jobs
from services.finetune import progress
from services.finetune.errors import Unavailable
from services.finetune.store import Store
from tests.common.jobbing import (
    NAME,
    SIMPLE,
    ScriptLauncher,
    check_history,
    ended,
    handle_of,
    queue,
    running,
    states,
    until,
)
from tests.common.launchers.cluster import Cluster
from tests.common.launchers.conftest import Make, maker


@pytest.fixture(params=["local", "kubernetes"])
def make(request: pytest.FixtureRequest, sqlite_url: str, file_store: Store, tmp_path: Path) -> Make:
    if request.param == "local":
        return maker(lambda: ScriptLauncher(tmp_path), sqlite_url, file_store)
    made: Make = request.getfixturevalue("on_cluster")
    return made


# ---------------------------------------------------------------------------------------------- everywhere


def test_whole_life(make: Make) -> None:
    jobs = make()
    queue(jobs, SIMPLE)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["result"]["step"]) == ("SUCCEEDED", 1, 4)
    assert states(jobs, NAME) == ["QUEUED", "PREPARING", "RUNNING", "SUCCEEDED"]
    check_history(jobs, NAME, 5)


def test_cancel_while_running(make: Make) -> None:
    jobs = make()
    queue(jobs, [["events", 2], ["sleep", 60], ["end"]])
    until(jobs, NAME, running)
    jobs.cancel(NAME)
    job = ended(jobs, NAME)
    assert (job.state, states(jobs, NAME)[-1]) == ("CANCELLED", "CANCELLED")
    check_history(jobs, NAME, 2)


def test_cancel_kills_a_deaf_worker(make: Make) -> None:
    jobs = make(grace_s=1.0)
    queue(jobs, [["deaf"], ["events", 2], ["wait", "/no/such/file"], ["end"]])
    until(jobs, NAME, running)
    jobs.cancel(NAME)
    job = ended(jobs, NAME)
    assert job.state == "CANCELLED"
    assert not jobs.supervisor.launcher.alive(job.body["handle"])


def test_pause_and_resume(make: Make) -> None:
    """PAUSED means that its place is free: the process, or the Job and its pods, are gone."""
    jobs = make()
    queue(jobs, [["events", 2], ["checkpoint", 4], ["only", 1, "sleep", 60], ["events", 2], ["end"]])
    until(jobs, NAME, running)
    handle = handle_of(jobs)
    jobs.ask(NAME, wishes.pause)
    until(jobs, NAME, lambda job: job.state == "PAUSED")
    assert not jobs.supervisor.launcher.alive(handle)
    jobs.ask(NAME, wishes.resume)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 0)
    check_history(jobs, NAME, 4)


def test_lost_worker_is_replaced(make: Make) -> None:
    jobs = make()
    queue(jobs, [["events", 2], ["only", 1, "die"], ["events", 2], ["end"]])
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 1)
    check_history(jobs, NAME, 4)


def test_users_fault_ends_it_at_once(make: Make) -> None:
    jobs = make()
    queue(jobs, [["events", 1], ["fail", "DATASET_EMPTY"]])
    job = ended(jobs, NAME)
    assert (job.state, job.body["error"]["reason"], job.body["attempt"]) == ("FAILED", "DATASET_EMPTY", 1)


def test_a_name_used_again_meets_nothing_of_the_old_job(make: Make) -> None:
    jobs = make()
    queue(jobs, [["events", 1], ["fail", "OLD"]])
    jobs.delete(NAME, ended(jobs, NAME).etag)
    queue(jobs, SIMPLE)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 1)


class Cut(BaseException):
    """The end of a service."""


def test_a_worker_launched_and_not_noted_is_taken_over(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs = make()
    queue(jobs, [["events", 2], ["wait", str(tmp_path / "go")], ["end"]])
    real = jobs.supervisor.launcher.launch

    def launch(*args: Any) -> Any:
        real(*args)
        raise Cut

    monkeypatch.setattr(jobs.supervisor.launcher, "launch", launch)
    with pytest.raises(Cut):
        jobs.supervisor.tick()
    deadline = time.monotonic() + 10
    while progress.read_claim(jobs.store, jobs.get(NAME).body["key"], 1) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second = make()
    until(second, NAME, running)
    (tmp_path / "go").touch()
    job = ended(second, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 1)


# ---------------------------------------------------------------------------------------------- on a cluster only

LONG: list[list[Any]] = [["events", 1], ["checkpoint", 1], ["only", 1, "sleep", 60], ["events", 1], ["end"]]
LONG_AND_DEAF: list[list[Any]] = [
    ["only", 1, "deaf"],
    *[s if s[0] != "only" else ["only", 1, "wait", "/no"] for s in LONG],
]


def messages(jobs: Jobs) -> list[str]:
    return [event["message"] for _, event in jobs.records.events(NAME, 0) if event["type"] == "state"]


def test_an_evicted_worker_that_saves_and_leaves_goes_on_elsewhere(k8s: Cluster, on_cluster: Make) -> None:
    jobs = on_cluster()
    queue(jobs, LONG)
    until(jobs, NAME, running)
    k8s.evict(k8s.pod_of(handle_of(jobs)))
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 0)
    assert "the worker of attempt 1 was taken away" in messages(jobs)
    check_history(jobs, NAME, 2)


def test_evictions_never_use_up_a_job(k8s: Cluster, on_cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spot nodes may be taken away more often than a worker may be lost by its own fault."""
    monkeypatch.setattr("services.common.supervisor.MAX_LOST", 1)
    jobs = on_cluster()
    queue(jobs, LONG_AND_DEAF)
    until(jobs, NAME, running)
    k8s.evict(k8s.pod_of(handle_of(jobs)), grace_s=0.1)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 0)
    check_history(jobs, NAME, 2)


def test_an_eviction_that_nobody_saw_is_known_by_the_pod_that_came_after(k8s: Cluster, on_cluster: Make) -> None:
    """The service was away: the Job made a second pod, which found the attempt taken and left with 75."""
    jobs = on_cluster()
    queue(jobs, LONG_AND_DEAF)
    until(jobs, NAME, running)
    handle = handle_of(jobs)
    k8s.evict(k8s.pod_of(handle), grace_s=0.1)
    deadline = time.monotonic() + 15
    while k8s.objects["jobs", handle["job"]]["status"].get("conditions") is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    [pod] = k8s.pods(handle["job"])
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 75
    job = ended(on_cluster(), NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 0)


def test_evicted_before_it_began_is_the_clusters_own_business(k8s: Cluster, on_cluster: Make) -> None:
    k8s.unschedulable = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    jobs = on_cluster()
    queue(jobs, SIMPLE)
    handle = handle_of(jobs)
    until(jobs, NAME, lambda job: bool(k8s.pods(handle["job"])))
    k8s.evict(k8s.pods(handle["job"])[0]["metadata"]["name"], reason="PreemptionByScheduler")
    k8s.unschedulable = ""
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 1)


def test_a_lost_node_holds_nothing_up_and_its_zombie_is_fenced(k8s: Cluster, on_cluster: Make, tmp_path: Path) -> None:
    """The pod's end is never confirmed, and its process lives on: it must not publish."""
    jobs = on_cluster()
    go = tmp_path / "go"
    queue(jobs, [["events", 1], ["only", 1, "wait", str(go)], ["events", 1], ["end"]])
    until(jobs, NAME, running)
    pod = k8s.pod_of(handle_of(jobs))
    k8s.lose_node(pod, ago_s=10)
    for _ in range(20):
        jobs.supervisor.tick()
        time.sleep(0.02)
    assert jobs.get(NAME).body["attempt"] == 1, "given up before its own end was surely over"
    k8s.lose_node(pod, ago_s=60)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 0)
    go.touch()
    assert k8s.processes[pod].wait(timeout=20) == 75
    check_history(jobs, NAME, 2)


def test_preemption_by_a_queue(k8s: Cluster, on_cluster: Make) -> None:
    """Kueue suspends the Job; the next attempt is a new Job in the queue, and the old one does not linger there."""
    jobs = on_cluster()
    queue(jobs, LONG)
    until(jobs, NAME, running)
    first = handle_of(jobs)["job"]
    k8s.suspend(first, True)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 0)
    assert ("jobs", first) not in k8s.objects


def test_a_suspended_job_waits_for_its_turn(k8s: Cluster, on_cluster: Make) -> None:
    k8s.objects["cronjobs", "quartet-worker"]["spec"]["jobTemplate"]["spec"]["suspend"] = True
    jobs = on_cluster()
    queue(jobs, SIMPLE)
    handle = handle_of(jobs)
    for _ in range(10):
        jobs.supervisor.tick()
        time.sleep(0.02)
    assert jobs.get(NAME).state == "PREPARING" and k8s.pods(handle["job"]) == []
    k8s.suspend(handle["job"], False)
    assert ended(jobs, NAME).state == "SUCCEEDED"


def test_what_keeps_a_pod_from_starting_is_told(k8s: Cluster, on_cluster: Make) -> None:
    k8s.unschedulable = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    jobs = on_cluster()
    queue(jobs, SIMPLE)

    def told() -> list[str]:
        return [event["text"] for _, event in jobs.records.events(NAME, 0) if event["type"] == "log"]

    until(jobs, NAME, lambda job: len(told()) == 1)
    k8s.image_missing, k8s.unschedulable = True, ""
    until(jobs, NAME, lambda job: len(told()) == 2)
    k8s.image_missing = False
    assert ended(jobs, NAME).state == "SUCCEEDED"
    assert told() == [
        "Unschedulable: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        'ImagePullBackOff: Back-off pulling image "quartet/worker:0.1.0-cpu"',
    ]


def test_memory_that_ran_out_is_told(k8s: Cluster, on_cluster: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.supervisor.MAX_LOST", 1)
    jobs = on_cluster()
    queue(jobs, [["events", 1], ["sleep", 60]])
    until(jobs, NAME, running)
    k8s.kill_for_memory(k8s.pod_of(handle_of(jobs)))
    job = ended(jobs, NAME)
    assert job.state == "FAILED" and job.body["error"]["reason"] == "WORKER_LOST"
    assert "OOMKilled: it took more memory than its limit" in job.body["error"]["message"]


def test_a_job_whose_answer_was_lost_is_made_once(k8s: Cluster, on_cluster: Make) -> None:
    """The API server made it and its answer never came: N2."""
    jobs = on_cluster()
    queue(jobs, SIMPLE)
    k8s.swallow = 1
    with pytest.raises(Unavailable):
        jobs.supervisor.tick()
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body.get("lost")) == ("SUCCEEDED", 1, None)
    assert k8s.calls.count(("create", "jobs")) == 1


@pytest.mark.parametrize("away_s", [1, pytest.param(60, marks=pytest.mark.slow)])
def test_an_api_that_is_away_loses_nothing(k8s: Cluster, on_cluster: Make, tmp_path: Path, away_s: float) -> None:
    jobs = on_cluster()
    queue(jobs, [["events", 2], ["wait", str(tmp_path / "go")], ["end"]])
    until(jobs, NAME, running)
    k8s.down = True
    jobs.start()  # as the service runs it: it must not give up either
    time.sleep(away_s)
    (tmp_path / "go").touch()
    time.sleep(1)
    assert jobs.get(NAME).state == "RUNNING"
    k8s.down = False
    deadline = time.monotonic() + 20
    while jobs.get(NAME).state != "SUCCEEDED":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    jobs.stop()
    assert jobs.get(NAME).body["attempt"] == 1
    check_history(jobs, NAME, 2)


@pytest.mark.parametrize("code", [408, 409, 410, 429, 500, 504])
def test_answers_that_say_nothing_of_the_job_cost_nothing(k8s: Cluster, on_cluster: Make, code: int) -> None:
    """A list that expired, a conflict, a server with too much to do: whatever call meets it, nothing is made twice."""
    jobs = on_cluster()
    queue(jobs, [["events", 3], ["sleep", 0.3], ["events", 2], ["end"]])
    deadline = time.monotonic() + 20
    for tick in itertools.count():
        if jobs.get(NAME).state == "SUCCEEDED":
            break
        assert time.monotonic() < deadline, jobs.get(NAME)
        k8s.refusals = [code] if tick % 3 == 0 else []
        with contextlib.suppress(Unavailable):
            jobs.supervisor.tick()
        time.sleep(0.01)
    job = jobs.get(NAME)
    assert (job.body.get("lost", 0), len(k8s.processes)) == (0, 1)
    check_history(jobs, NAME, 5)


def test_two_services_at_once_make_no_second_worker(
    k8s: Cluster, on_cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rolling update: the old replica and the new one supervise the same jobs for a while."""
    first, second = on_cluster(), on_cluster()
    queue(first, SIMPLE)
    first.start()
    second.start()
    try:
        deadline = time.monotonic() + 30
        while first.get(NAME).state != "SUCCEEDED":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        first.stop()
        second.stop()
    check_history(first, NAME, 5)
    assert len(k8s.processes) == first.get(NAME).body["attempt"] == 1


def test_a_worker_killed_with_its_service_away_is_replaced(k8s: Cluster, on_cluster: Make) -> None:
    jobs = on_cluster()
    queue(jobs, [["events", 1], ["only", 1, "wait", "/no"], ["events", 1], ["end"]])
    until(jobs, NAME, running)
    os.kill(k8s.pid_of(handle_of(jobs)), signal.SIGKILL)
    jobs.records.close()
    job = ended(on_cluster(), NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 1)
