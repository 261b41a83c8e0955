"""Attempts of several nodes and GPUs: an Indexed Job whose pods meet, live and die as one."""

from __future__ import annotations

import os
import signal
import socket
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from services.common.launchers import Shape
from services.common.launchers.kubernetes import KubernetesLauncher, filled, job_name, meeting, shaped, times
from services.common.launchers.local import LocalLauncher
from services.finetune.errors import FailedPrecondition, Unavailable
from tests.common.jobbing import NAME, check_history, ended, handle_of, queue, running, until
from tests.common.launchers.cluster import Cluster
from tests.common.launchers.conftest import Make
from tests.common.launchers.programs import SLEEP, soon
from tests.k8s.rendered import OVERLAYS, VERSIONS, of_kind, overlay, problems

STAYS: list[list[Any]] = [["events", 1], ["only", 1, "sleep", 60], ["events", 1], ["end"]]


@pytest.fixture(autouse=True)
def free_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pods of these tests share one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setattr("services.common.launchers.kubernetes.MASTER_PORT", probe.getsockname()[1])


def job_of(overlay_name: str, shape: Shape) -> dict[str, Any]:
    [cron] = [m for m in of_kind(overlay(overlay_name), "CronJob") if m["metadata"]["name"] == "quartet-worker"]
    return shaped(filled(cron["spec"]["jobTemplate"], "quartet-worker", "n-1", ["-m", "x"], {}), shape)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay_name", OVERLAYS)
def test_every_shape_is_valid(overlay_name: str, version: str) -> None:
    for shape in (Shape(1, 8), Shape(4, 0), Shape(2, 8)):
        job = job_of(overlay_name, shape)
        assert problems(job, version) == []
        job["metadata"]["uid"] = "0"
        assert problems(meeting(job), version) == []
        assert (job["spec"].get("completionMode") == "Indexed") == (shape.nodes > 1)
        assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (shape.nodes, shape.nodes)


def test_resources_grow_with_the_gpus() -> None:
    one, eight = (job_of("gpu", Shape(1, n))["spec"]["template"]["spec"]["containers"][0] for n in (0, 8))
    assert one["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert eight["resources"]["limits"] == {
        "nvidia.com/gpu": "8",
        "cpu": "128",
        "memory": "768Gi",
        "ephemeral-storage": one["resources"]["limits"]["ephemeral-storage"],
    }
    assert (eight["resources"]["requests"]["cpu"], eight["resources"]["requests"]["memory"]) == ("32", "256Gi")
    assert job_of("local", Shape(1, 8)) == job_of("local", Shape(1, 0)), "there is no GPU to ask for"


def test_quantities() -> None:
    assert [times(q, Fraction(3)) for q in ("4", "500m", "32Gi")] == ["12", "1500m", "96Gi"]
    assert times("3", Fraction(1, 2)) == "2"
    with pytest.raises(FailedPrecondition, match="1500m"):
        times("1.5", Fraction(2))


def test_the_name_leaves_place_for_the_index() -> None:
    assert all(len(f"{job_name(name)}-99999") <= 63 for name in ("x" * 200, "default.trainingJobs.a.1-1"))


def test_one_machine_is_one_node(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        LocalLauncher(tmp_path).launch(SLEEP, "a", {}, Shape(2))
    assert caught.value.reason == "SHAPE_UNAVAILABLE" and "parallel.nodes" in caught.value.message


def test_nodes_meet_and_end_as_one(k8s: Cluster, on_cluster: Make) -> None:
    jobs = on_cluster()
    queue(jobs, [["events", 2], ["checkpoint", 4], ["events", 1], ["end"]], nodes=3)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], len(k8s.processes)) == ("SUCCEEDED", 1, 3)
    check_history(jobs, NAME, 3)
    handle = job.body["handle"]
    soon(lambda: k8s.objects["jobs", handle["job"]]["status"].get("conditions", [{}])[0].get("type") == "Complete")
    jobs.supervisor.launcher.stop(handle, 1)
    soon(lambda: not {"jobs", "services", "pods"} & {plural for plural, _ in k8s.objects})


def test_a_lost_node_takes_the_others_along(k8s: Cluster, on_cluster: Make) -> None:
    """The second node is drained; no attempt is counted, and all nodes begin again."""
    jobs = on_cluster()
    queue(jobs, STAYS, nodes=2)
    until(jobs, NAME, running)
    k8s.evict(k8s.pod_of(handle_of(jobs), 1), grace_s=0.1)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 0)
    check_history(jobs, NAME, 2)
    soon(lambda: all(process.poll() is not None for process in k8s.processes.values()))


def test_a_node_that_fails_is_no_eviction_of_the_first(
    k8s: Cluster, on_cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first node is told to leave because the second died: this counts, or such a job would go on for ever."""
    monkeypatch.setattr("services.common.supervisor.MAX_LOST", 1)
    jobs = on_cluster()
    queue(jobs, [["events", 1], ["sleep", 60], ["end"]], nodes=2)
    until(jobs, NAME, running)
    os.kill(k8s.processes[k8s.pod_of(handle_of(jobs), 1)].pid, signal.SIGKILL)
    job = ended(jobs, NAME)
    assert (job.state, job.body["error"]["reason"], job.body["attempt"]) == ("FAILED", "WORKER_LOST", 1)


def test_memory_that_ran_out_on_one_node_is_told(
    k8s: Cluster, on_cluster: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.common.supervisor.MAX_LOST", 1)
    jobs = on_cluster()
    queue(jobs, [["events", 1], ["sleep", 60], ["end"]], nodes=2)
    until(jobs, NAME, running)
    k8s.kill_for_memory(k8s.pod_of(handle_of(jobs), 1))
    assert "OOMKilled" in ended(jobs, NAME).body["error"]["message"]


def test_cancel_ends_every_node(k8s: Cluster, on_cluster: Make) -> None:
    jobs = on_cluster()
    queue(jobs, STAYS, nodes=3)
    until(jobs, NAME, running)
    jobs.cancel(NAME)
    assert ended(jobs, NAME).state == "CANCELLED"
    soon(lambda: all(process.poll() is not None for process in k8s.processes.values()))


def test_a_service_cut_before_the_nodes_could_meet(k8s: Cluster, on_cluster: Make) -> None:
    """The Job is there, its headless Service is not: the next service makes it."""
    jobs = on_cluster()
    queue(jobs, [["events", 1], ["end"]], nodes=2)
    k8s.swallow = 1
    with pytest.raises(Unavailable):
        jobs.supervisor.tick()
    assert not any(plural == "services" for plural, _ in k8s.objects)
    job = ended(on_cluster(), NAME)
    assert (job.state, job.body["attempt"], job.body.get("lost")) == ("SUCCEEDED", 1, None)


def test_only_training_may_make_services(k8s: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(k8s.kubeconfig("quartet-conversion")))
    launcher = KubernetesLauncher("", "quartet-worker")
    launcher.launch(SLEEP, "a", {})
    with pytest.raises(Exception, match="cannot create resource"):
        launcher.launch(SLEEP, "b", {}, Shape(2))
