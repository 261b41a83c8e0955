"""Adapters come and go while an endpoint answers; nobody hears a mixture of two versions."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from services.finetune.store.artifacts import load, materialise
from services.finetune.store.holds import list_holds
from tests.common.serving import refused
from tests.inference.conftest import READY, Models, Service, until
from tests.inference.published import WORKSPACE, adapter, tiny_adapter
from tests.inference.wire import GREEDY, endpoint, turns, whole

LONG = pb.Sampling(temperature=0, max_tokens=200)


@pytest.fixture(scope="module")
def live(service: Service, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A READY endpoint of the bare model; `one`, `three` and `hollow` are adapters on it."""
    folder = tmp_path_factory.mktemp("more")
    base = materialise(service.store, load(service.store, models.tiny), folder / "base")
    adapter(service.store, tiny_adapter(base, folder / "three", 3), "three", models.tiny)
    hollow = folder / "hollow"
    hollow.mkdir()
    (hollow / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    adapter(service.store, hollow, "hollow", models.tiny)
    made = endpoint(service.stub, "live")
    service.wait_for(made.name, READY)
    yield made.name
    service.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=made.name))


def put(service: Service, name: str, alias: str, model: str, etag: str = "") -> pb.Endpoint:
    wanted = pb.ServedAdapter(alias=alias, model=f"{WORKSPACE}/models/{model}")
    return service.stub.LoadAdapter(pb.LoadAdapterRequest(endpoint=name, adapter=wanted, etag=etag))


def drop(service: Service, name: str, alias: str) -> pb.Endpoint:
    return service.stub.UnloadAdapter(pb.UnloadAdapterRequest(endpoint=name, alias=alias))


def ask(service: Service, name: str, alias: str, sampling: pb.Sampling = GREEDY) -> list[int]:
    request = pb.ChatRequest(endpoint=name, adapter=alias, messages=turns("hi"), sampling=sampling)
    return whole(service.stub.Chat(request))[1]


def test_an_adapter_is_served_as_if_it_had_been_there_from_the_start(service: Service, live: str) -> None:
    bare = ask(service, live, "")
    told = put(service, live, "a", "one")
    assert [(a.alias, a.model) for a in told.adapters] == [("a", f"{WORKSPACE}/models/one")]
    served = service.stub.ListServedModels(pb.ListServedModelsRequest(parent=WORKSPACE)).models
    assert ("a", told.adapters[0].digest) in [(m.adapter, m.digest) for m in served if m.endpoint == live]
    other = endpoint(service.stub, "start", adapters=[("a", "one")])
    service.wait_for(other.name, READY)
    assert ask(service, live, "a") == ask(service, other.name, "a") != bare
    assert ask(service, live, "") == bare
    service.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=other.name))


def test_what_is_served_is_held_and_nothing_else(service: Service, live: str, models: Models) -> None:
    """The registry of models, another service, knows endpoints by what they hold."""

    def held(name: str) -> list[set[str]]:
        return [set(h.digests) for h in list_holds(service.store) if h.holder == name]

    put(service, live, "h", "one")
    assert models.tiny in held(live)[0] and models.one in held(live)[0]
    for alias in [a.alias for a in drop(service, live, "h").adapters]:
        drop(service, live, alias)
    until(lambda: held(live) == [{models.tiny}])
    brief = endpoint(service.stub, "brief", adapters=[("a", "one")]).name
    assert held(brief) == [{models.tiny, models.one}]
    service.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=brief))
    until(lambda: held(brief) == [])


def test_an_alias_goes_over_at_once_and_answers_under_way_keep_theirs(service: Service, live: str) -> None:
    put(service, live, "v", "one")
    old = ask(service, live, "v", LONG)
    request = pb.ChatRequest(endpoint=live, adapter="v", messages=turns("hi"), sampling=LONG)
    under_way = service.stub.Chat(request)
    begun = next(iter(under_way))
    put(service, live, "v", "three")
    new = ask(service, live, "v", LONG)
    assert [*begun.token_ids, *whole(under_way)[1]] == old
    assert new != old and ask(service, live, "v", LONG) == new
    put(service, live, "v", "one")
    assert ask(service, live, "v", LONG) == old, "rolled back"
    drop(service, live, "v")
    with refused(NotFound, "ADAPTER_NOT_FOUND"):
        ask(service, live, "v")
    with refused(NotFound, "ADAPTER_NOT_FOUND"):
        drop(service, live, "v")


def test_what_cannot_be_served_changes_nothing(service: Service, live: str) -> None:
    etag = put(service, live, "a", "one").etag
    before = ask(service, live, "a")
    with refused(FailedPrecondition, "MODEL_NOT_SERVABLE"):
        put(service, live, "a", "hollow")
    with refused(FailedPrecondition, "BASE_MISMATCH"):
        put(service, live, "a", "two")
    with refused(InvalidArgument, "ALIAS_MALFORMED") as error:
        put(service, live, "Not One", "one")
    assert error[0].violations[0].field == "adapter.alias"
    with refused(Aborted, "ETAG_MISMATCH"):
        put(service, live, "a", "three", etag)
    assert ask(service, live, "a") == before
    found = service.stub.GetEndpoint(pb.GetEndpointRequest(name=live))
    assert [(a.alias, a.model) for a in found.adapters] == [("a", f"{WORKSPACE}/models/one")]


def test_an_engine_that_dies_comes_back_with_its_adapters(service: Service, live: str) -> None:
    put(service, live, "a", "three")
    before = ask(service, live, "a")
    (engine,) = service.engines()
    os.kill(engine, signal.SIGKILL)
    until(lambda: service.engines() not in ([], [engine]), 60)
    service.wait_for(live, READY)
    assert ask(service, live, "a") == before
    drop(service, live, "a")


def test_adapters_of_an_endpoint_that_starts_are_there_when_it_is_ready(service: Service, models: Models) -> None:
    made = endpoint(service.stub, "young")
    assert put(service, made.name, "a", "one").state == pb.Endpoint.STARTING
    service.wait_for(made.name, READY)
    assert put(service, made.name, "b", "untold").state == READY
    assert ask(service, made.name, "a")
    service.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=made.name))
