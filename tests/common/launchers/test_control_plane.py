"""What a real API server makes of our manifests and our Jobs; see control_plane.py."""

from __future__ import annotations

import time
from urllib.error import HTTPError

import pytest

from services.common.launchers.kubernetes import KubernetesLauncher
from services.finetune.errors import PermissionDenied
from tests.common.jobbing import NAME, SIMPLE, check_history, ended, handle_of, queue, running, until
from tests.common.launchers.conftest import Make
from tests.common.launchers.control_plane import ControlPlane
from tests.common.launchers.programs import SLEEP
from tests.common.launchers.test_life import LONG
from tests.k8s import rendered
from tests.k8s.rendered import COMPONENTS, OVERLAYS, with_components

pytestmark = pytest.mark.control_plane


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_takes_our_manifests_without_a_warning(real: ControlPlane, overlay: str) -> None:
    """Its own checks, and Pod Security's, which warns of what it would refuse."""
    known = [c for c in COMPONENTS if c not in ("gateway-api", "monitoring", "postgres", "seaweedfs", "quota")]
    told = real.apply(with_components(overlay, tuple(known)))
    assert "persistentvolumeclaim/quartet-node-cache serverside-applied" in told
    real.apply(rendered.overlay("local"))


def test_it_would_not_take_everything(real: ControlPlane) -> None:
    volume = {"name": "host", "hostPath": {"path": "/"}}
    spec = {"serviceAccountName": "quartet-worker", "containers": [{"name": "x", "image": "x:1"}], "volumes": [volume]}
    with pytest.raises(HTTPError) as caught:
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
        real.call("POST", "api/v1/namespaces/quartet/pods", body)
    assert caught.value.code == 403 and b"violates PodSecurity" in caught.value.read()


def test_a_job_runs_to_its_end(real: ControlPlane, on_real: Make) -> None:
    jobs = on_real()
    queue(jobs, SIMPLE)
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"]) == ("SUCCEEDED", 1)
    check_history(jobs, NAME, 5)


def test_an_eviction_costs_no_attempt_that_counts(real: ControlPlane, on_real: Make) -> None:
    jobs = on_real()
    queue(jobs, LONG)
    until(jobs, NAME, running)
    real.evict(real.pod_of(handle_of(jobs)))
    job = ended(jobs, NAME)
    assert (job.state, job.body["attempt"], job.body["lost"]) == ("SUCCEEDED", 2, 0)


def test_the_server_may_be_killed(real: ControlPlane, on_real: Make) -> None:
    jobs = on_real()
    queue(jobs, [["events", 2], ["sleep", 5], ["events", 1], ["end"]])
    until(jobs, NAME, running)
    jobs.start()
    real.kill_api()
    time.sleep(1)
    real.serve()
    deadline = time.monotonic() + 60
    while jobs.get(NAME).state != "SUCCEEDED":
        assert time.monotonic() < deadline, jobs.get(NAME)
        time.sleep(0.05)
    jobs.stop()
    assert jobs.get(NAME).body["attempt"] == 1


def test_an_account_may_do_what_its_role_says_and_no_more(real: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(real.kubeconfig("quartet-inference")))
    with pytest.raises(PermissionDenied) as caught:
        KubernetesLauncher("", "quartet-worker").launch(SLEEP, "a", {})
    assert caught.value.reason == "CLUSTER_REFUSED" and "cronjobs.batch" in caught.value.message


def test_a_full_quota_is_told_in_the_clusters_words(real: ControlPlane) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}}
    root = "api/v1/namespaces/quartet/resourcequotas"
    real.call("POST", root, {**quota, "spec": {"hard": {"count/jobs.batch": "0"}}})
    try:
        deadline = time.monotonic() + 60
        while "hard" not in real.call("GET", f"{root}/full")["status"]:  # until then it holds nobody
            assert time.monotonic() < deadline
            time.sleep(0.1)
        with pytest.raises(PermissionDenied, match="exceeded quota") as caught:
            KubernetesLauncher("", "quartet-worker").launch(SLEEP, "a", {})
        assert caught.value.reason == "CLUSTER_REFUSED"
    finally:
        real.call("DELETE", f"{root}/full")
