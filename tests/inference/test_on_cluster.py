"""Engine servers as Jobs of a cluster: the pods are real engines, the cluster is tests/common/launchers/cluster.py."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quartet.inference.v1 import inference_pb2 as pb

from services.common.server import Room
from services.finetune.errors import InvalidArgument
from services.finetune.progress import Attempt
from services.finetune.store import Store
from services.inference.engines.__main__ import HOST_VARIABLE, serve
from tests.common.launchers.cluster import Cluster, cluster
from tests.inference.conftest import READY, Service, publish, until
from tests.inference.wire import GREEDY, endpoint, turns, whole

NAME = "workspaces/default/endpoints/e"


@pytest.fixture()
def k8s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = str(probe.getsockname()[1])
    with cluster(tmp_path / "cluster") as running:
        blueprint = running.objects["cronjobs", "quartet-engine"]["spec"]["jobTemplate"]["spec"]
        variables = blueprint["template"]["spec"]["containers"][0]["env"]
        next(v for v in variables if v["name"] == "QUARTET_ENGINE_PORT")["value"] = free
        monkeypatch.setenv("KUBECONFIG", str(running.kubeconfig("quartet-inference")))
        yield running


@pytest.fixture()
def service(k8s: Cluster, tmp_path: Path) -> Iterator[Service]:
    home = tmp_path / "home"
    home.mkdir()
    running = Service(home, "--launcher", "kubernetes", "--blueprint", "quartet-engine").start()
    yield running
    if running.process.poll() is None:
        running.kill()


def ask(service: Service) -> str:
    return whole(service.stub.Chat(pb.ChatRequest(endpoint=NAME, messages=turns("hi"), sampling=GREEDY)))[0]


@pytest.mark.slow
def test_engines_outlive_a_rolling_update_and_come_back_after_an_eviction(
    k8s: Cluster, service: Service, tmp_path: Path
) -> None:
    publish(service.store, tmp_path / "models")
    endpoint(service.stub, "e")
    told = service.wait_for(NAME, READY)
    answer = ask(service)
    [engine] = service.engines()

    assert service.stop() == 0, service.logs()
    service.start()
    assert service.wait_for(NAME, READY).address == told.address
    assert service.engines() == [engine] and ask(service) == answer

    [pod] = [p["metadata"]["name"] for p in k8s.pods() if p["status"]["phase"] == "Running"]
    k8s.evict(pod)
    until(lambda: service.engines() not in ([engine], []), 30, service.logs)
    service.wait_for(NAME, READY)
    assert ask(service) == answer

    service.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=NAME))
    until(lambda: not service.engines())
    assert service.stop() == 0 and "Traceback" not in service.logs()


def test_an_engine_never_listens_where_strangers_are_without_a_token(
    file_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOST_VARIABLE, "10.1.2.3")
    unasked: Any = None
    with pytest.raises(InvalidArgument) as caught:
        asyncio.run(serve(Room("x", lambda server: None), unasked, "", Attempt(file_store, "jobs/x", 1)))
    assert caught.value.reason == "ADDRESS_EXPOSED"
