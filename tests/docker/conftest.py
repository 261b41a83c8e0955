"""The rendered manifests run by podman: a store, a database, the four services and the gateway, with a cluster's API whose
kubelet runs the pods of Jobs as containers too."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.common.launchers.cluster import Cluster, cluster
from tests.common.launchers.pods import Json
from tests.docker.podman import BASE, ENV, Host, errors_of, have, image, make_database_image, make_store_image, podman
from tests.docker.stack import GATEWAY, ROOMS, Stack, serving, start
from tests.k8s.rendered import of_kind, overlay
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    for pod in ("quartet-datasets", "quartet-gateway", "quartet-worker", "quartet-engine"):
        assert have(image(pod)), f"make images VARIANT=cpu makes {image(pod)}"
    for pod, make in (("quartet-store", make_store_image), ("quartet-postgres", make_database_image)):
        if not have(image(pod)):
            make(image(pod), BASE, tmp_path_factory.mktemp("image"))
    folder = tmp_path_factory.mktemp("host")
    tiny_model(folder / "tiny")
    [settings] = of_kind(overlay("local"), "ConfigMap")
    # The command line looks for a folder where it runs before it asks a service to import it: one path for both.
    config = {**settings["data"], "QUARTET_IMPORT_ROOTS": str(folder / "tiny")}
    for path in [folder, *folder.parents[:2], *folder.rglob("*")]:
        path.chmod(0o755)  # containers run as users of their own
    running = Host(folder, config, mounts=[f"{folder / 'tiny'}:{folder / 'tiny'}:ro"]).open()
    yield running
    running.close()


@pytest.fixture(scope="session")
def k8s(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    def run(pod: Json) -> tuple[list[str], Mapping[str, str]]:
        return host.words(pod["metadata"]["name"], pod), ENV

    with cluster(tmp_path_factory.mktemp("cluster"), "0.0.0.0", run) as running:
        yield running


@pytest.fixture(scope="session")
def stack(host: Host, k8s: Cluster) -> Stack:
    """All of it up; the addresses are those published on this machine."""
    start(host, "quartet-store")
    start(host, "quartet-postgres")
    deadline = time.monotonic() + 120
    while "ready to accept" not in podman("logs", "quartet-postgres", check=False) + errors_of("quartet-postgres"):
        assert time.monotonic() < deadline, errors_of("quartet-postgres")
        time.sleep(0.2)
    made = Stack(host, k8s, {"QUARTET_TOKEN_FILE": str(host.folder / "quartet-token" / "token")})
    for room, port in ROOMS.items():
        config: Path = k8s.kubeconfig(f"quartet-{room}", host.gateway)
        config.chmod(0o644)
        account = ["-v", f"{config}:/etc/kubeconfig:ro", "--env", "KUBECONFIG=/etc/kubeconfig"]
        begun = time.monotonic()
        start(host, f"quartet-{room}", "-p", f"127.0.0.1::{port}", *account)
        made.addresses[f"QUARTET_{room.upper()}_ENDPOINT"] = podman("port", f"quartet-{room}", f"{port}/tcp")
        serving(made.address(room))
        made.started_s[f"quartet-{room}"] = time.monotonic() - begun
    begun = time.monotonic()
    start(host, "quartet-gateway", "-p", f"127.0.0.1::{GATEWAY}")
    made.gateway = podman("port", "quartet-gateway", f"{GATEWAY}/tcp")
    made.answering()
    made.started_s["quartet-gateway"] = time.monotonic() - begun
    return made
