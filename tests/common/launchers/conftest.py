"""Both places where workers run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.common.launchers import Handle, Launcher
from services.common.launchers.kubernetes import KubernetesLauncher
from services.common.launchers.local import LocalLauncher
from tests.common.launchers.cluster import Cluster, cluster


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


@dataclass(frozen=True)
class Place:
    """A kind of place: a new launcher of it, as a restarted service would make one, and the pid behind a handle."""

    open: Callable[[], Launcher]
    pid: Callable[[Handle], int]


@pytest.fixture(params=["local", "kubernetes"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(lambda: LocalLauncher(tmp_path), lambda handle: int(handle["pid"]))
    running: Cluster = request.getfixturevalue("k8s")
    return Place(lambda: KubernetesLauncher("", "quartet-worker"), running.pid_of)


@pytest.fixture()
def launcher(place: Place) -> Launcher:
    return place.open()
