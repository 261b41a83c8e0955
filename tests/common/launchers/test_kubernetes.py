"""What is special to a cluster; what all launchers share is in test_suite.py, whole jobs in test_life.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.common.launchers import open_launcher
from services.common.launchers.kubernetes import MADE_BY, KubernetesLauncher, filled, job_name
from services.common.launchers.local import LocalLauncher
from services.common.settings import Settings
from services.finetune.errors import FailedPrecondition, PermissionDenied, QuartetError, Unavailable
from tests.common.launchers.cluster import Cluster
from tests.common.launchers.programs import SLEEP, soon
from tests.k8s.rendered import OVERLAYS, VERSIONS, of_kind, overlay, problems


@pytest.fixture()
def launcher(k8s: Cluster) -> KubernetesLauncher:
    return KubernetesLauncher("", "quartet-worker")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay_name", OVERLAYS)
def test_the_job_of_every_blueprint_is_valid(overlay_name: str, version: str) -> None:
    for cron in of_kind(overlay(overlay_name), "CronJob"):
        blueprint = cron["metadata"]["name"]
        before = json.dumps(cron)
        job = filled(cron["spec"]["jobTemplate"], blueprint, "n-1", ["-m", "x", "s3://b/j?k=v"], {"A": "b"})
        assert problems(job, version) == [] and json.dumps(cron) == before
        container = job["spec"]["template"]["spec"]["containers"][0]
        assert container["args"] == ["-m", "x", "s3://b/j?k=v"] and container["env"][-1] == {"name": "A", "value": "b"}
        for labelled in (job, job["spec"]["template"]):
            assert labelled["metadata"]["labels"][MADE_BY] == blueprint
            assert labelled["metadata"]["labels"]["app.kubernetes.io/name"] == blueprint


def test_names_are_dns_labels_and_differ() -> None:
    names = ["default.trainingJobs.a.1-1", "default.trainingJobs.A.1-1", "x" * 200, "x" * 201, "小明-1", "-.-"]
    made = [job_name(n) for n in names]
    assert len(set(made)) == len(names)
    assert all(len(m) <= 63 and m.strip("-") and m[-1].isalnum() for m in made)


def test_settings_choose_the_launcher(k8s: Cluster, tmp_path: Path) -> None:
    settings = Settings(home=str(tmp_path))
    assert isinstance(open_launcher(settings), LocalLauncher)
    assert isinstance(open_launcher(replace(settings, launcher="kubernetes")), KubernetesLauncher)


def test_launching_twice_makes_one(k8s: Cluster, launcher: KubernetesLauncher) -> None:
    assert launcher.launch(SLEEP, "a", {}) == launcher.launch(SLEEP, "a", {})
    assert sum(plural == "jobs" for plural, _ in k8s.objects) == 1


def test_another_job_of_the_same_name_is_not_it(k8s: Cluster, launcher: KubernetesLauncher) -> None:
    handle = launcher.launch(SLEEP, "a", {})
    old = {**handle, "uid": "of-a-job-that-is-no-more"}
    assert not launcher.alive(old)
    launcher.stop({**old}, 1)
    assert "deletionTimestamp" not in k8s.objects["jobs", handle["job"]]["metadata"]
    assert launcher.alive(handle)


def test_a_job_that_somebody_deleted_is_gone(k8s: Cluster, launcher: KubernetesLauncher) -> None:
    handle = launcher.launch(SLEEP, "a", {})
    k8s.pod_of(handle)
    with k8s.lock:
        k8s.objects["jobs", handle["job"]]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    soon(lambda: not launcher.alive(handle))
    assert launcher.tail("a", 5) == "" and not launcher.disrupted(handle)


def test_lists_are_shared_by_all_jobs(
    k8s: Cluster, launcher: KubernetesLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls every POLL_S, however many jobs there are and however often each is asked for."""
    handles = [launcher.launch(SLEEP, f"job-{n}", {}) for n in range(5)]
    assert all(launcher.alive(h) for h in handles)
    monkeypatch.setattr("services.common.launchers.kubernetes.POLL_S", 60.0)
    k8s.calls.clear()
    for _ in range(50):
        assert all(launcher.alive(h) for h in handles)
    assert k8s.calls == []


def test_a_list_older_than_the_job_is_not_believed(
    k8s: Cluster, launcher: KubernetesLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = launcher.launch(SLEEP, "a", {})
    assert launcher.alive(first)
    monkeypatch.setattr("services.common.launchers.kubernetes.POLL_S", 60.0)
    assert launcher.alive(launcher.launch(SLEEP, "b", {}))


def test_a_missing_blueprint_says_what_to_do(k8s: Cluster) -> None:
    del k8s.objects["cronjobs", "quartet-worker"]
    with pytest.raises(FailedPrecondition) as caught:
        KubernetesLauncher("", "quartet-worker").launch(SLEEP, "a", {})
    assert caught.value.reason == "BLUEPRINT_MISSING" and "apply k8s/" in caught.value.message


def test_rights_end_at_the_own_blueprint_and_namespace(k8s: Cluster) -> None:
    for launcher in (KubernetesLauncher("", "quartet-engine"), KubernetesLauncher("kube-system", "quartet-worker")):
        with pytest.raises(PermissionDenied) as caught:
            launcher.launch(SLEEP, "a", {})
        assert caught.value.reason == "CLUSTER_REFUSED" and "quartet-training cannot" in caught.value.message.replace(
            '"', ""
        )


def test_the_inference_account_makes_engines(k8s: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(k8s.kubeconfig("quartet-inference")))
    launcher = KubernetesLauncher("", "quartet-engine")
    code = "import os; print(os.environ['QUARTET_ENGINE_HOST'], os.environ['QUARTET_ENGINE_PORT'])"
    handle = launcher.launch([sys.executable, "-c", code], "a", {})
    soon(lambda: not launcher.alive(handle))
    assert launcher.tail("a", 1) == "127.0.0.1 50060"


def test_a_wrong_token_is_told(k8s: Cluster, launcher: KubernetesLauncher) -> None:
    k8s.tokens["quartet-training"] = "changed"
    with pytest.raises(PermissionDenied, match="Unauthorized"):
        launcher.launch(SLEEP, "a", {})


def test_a_blueprint_that_the_cluster_refuses(k8s: Cluster, launcher: KubernetesLauncher) -> None:
    k8s.objects["cronjobs", "quartet-worker"]["spec"]["jobTemplate"]["spec"]["bakoffLimit"] = 1
    with pytest.raises(FailedPrecondition, match="bakoffLimit") as caught:
        launcher.launch(SLEEP, "a", {})
    assert caught.value.reason == "JOB_REFUSED"


def test_a_cluster_out_of_reach(k8s: Cluster, launcher: KubernetesLauncher, tmp_path: Path, monkeypatch: Any) -> None:
    handle = launcher.launch(SLEEP, "a", {})
    k8s.down = True
    for call in (
        lambda: launcher.launch(SLEEP, "b", {}),
        lambda: launcher.find("b", None),
        lambda: launcher.alive(handle),
        lambda: launcher.stop(handle, 1),
    ):
        with pytest.raises(Unavailable):
            call()
    k8s.down = False
    assert launcher.alive(handle)
    config = tmp_path / "elsewhere"
    config.write_text(k8s.kubeconfig("quartet-training").read_text().replace(str(k8s.server.server_address[1]), "9"))
    monkeypatch.setenv("KUBECONFIG", str(config))
    with pytest.raises(Unavailable):
        KubernetesLauncher("", "quartet-worker").alive(handle)


def test_no_cluster_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(QuartetError) as caught:
        KubernetesLauncher("", "quartet-worker")
    assert caught.value.reason == "CLUSTER_UNKNOWN"
