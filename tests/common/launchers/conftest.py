"""Both places where workers run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from services.common.jobs import Jobs
from services.common.launchers import ONE, Handle, Launcher, Shape
from services.common.launchers.kubernetes import KubernetesLauncher
from services.common.launchers.local import LocalLauncher
from services.common.records import Records
from services.finetune.store import Store
from tests.common.jobbing import ROOT, WORKER, work
from tests.common.launchers.cluster import Cluster, cluster
from tests.common.launchers.control_plane import ControlPlane, control_plane

Make = Callable[..., Jobs]


@pytest.fixture()
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the cluster are not kept: tests would wait for them."""
    monkeypatch.setattr("services.common.launchers.kubernetes.POLL_S", 0.02)


@pytest.fixture()
def k8s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: None) -> Iterator[Cluster]:
    """A running cluster, which KUBECONFIG points at."""
    with cluster(tmp_path / "cluster") as running:
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig("quartet-training")))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        yield running


class ScriptCluster(KubernetesLauncher):
    """The Kubernetes launcher, with tests/common/worker.py in the place of the library's worker."""

    def launch(self, command: Sequence[str], name: str, env: Mapping[str, str], shape: Shape = ONE) -> Handle:
        return super().launch(
            [sys.executable, str(WORKER), *command[3:]], name, {"PYTHONPATH": str(ROOT), **env}, shape
        )


def maker(launcher: Callable[[], Any], url: str, store: Store) -> Make:
    """A service that was just started, each time."""

    def make(**changes: Any) -> Jobs:
        given = {"max_workers": 2, "grace_s": 5.0, **changes}
        return Jobs(Records(url), store, launcher(), work(), **given)

    return make


@pytest.fixture()
def on_cluster(k8s: Cluster, sqlite_url: str, file_store: Store) -> Make:
    return maker(lambda: ScriptCluster("", "quartet-worker"), sqlite_url, file_store)


@dataclass(frozen=True)
class Place:
    """A kind of place: a new launcher of it, as a restarted service would make one, and the pid behind a handle."""

    open: Callable[[], Launcher]
    pid: Callable[[Handle], int]


@pytest.fixture(scope="session")
def session_control_plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with control_plane(tmp_path_factory.mktemp("control-plane")) as running:
        yield running


@pytest.fixture()
def real(session_control_plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> Iterator[ControlPlane]:
    """A real API server without any Jobs, which KUBECONFIG points at."""
    monkeypatch.setenv("KUBECONFIG", str(session_control_plane.kubeconfig("quartet-training")))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    yield session_control_plane
    session_control_plane.clear()


@pytest.fixture()
def on_real(real: ControlPlane, sqlite_url: str, file_store: Store) -> Make:
    return maker(lambda: ScriptCluster("", "quartet-worker"), sqlite_url, file_store)


@pytest.fixture(params=["local", "kubernetes", pytest.param("real", marks=pytest.mark.control_plane)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(lambda: LocalLauncher(tmp_path), lambda handle: int(handle["pid"]))
    running: Cluster | ControlPlane = request.getfixturevalue("k8s" if request.param == "kubernetes" else "real")
    return Place(lambda: KubernetesLauncher("", "quartet-worker"), running.pid_of)


@pytest.fixture()
def launcher(place: Place) -> Launcher:
    return place.open()
