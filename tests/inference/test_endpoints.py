"""The room through its socket, with real engine servers: what it accepts, and what it does when things die."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.common.auth import bearer
from services.finetune.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unavailable,
)
from tests.common.serving import refused
from tests.inference.conftest import FAILED, READY, Models, Service, publish, until
from tests.inference.published import WORKSPACE
from tests.inference.wire import GREEDY, endpoint, turns, whole


def delete(service: Service, name: str, etag: str = "") -> None:
    service.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=name, etag=etag))


def chat(stub: InferenceStub, name: str, sampling: pb.Sampling = GREEDY) -> tuple[str, list[int], pb.ChatResponse]:
    return whole(stub.Chat(pb.ChatRequest(endpoint=name, messages=turns("hi"), sampling=sampling)))


def test_bad_wishes_are_refused_before_anything_starts(service: Service, models: Models) -> None:
    stub = service.stub
    with refused(NotFound, "MODEL_NOT_FOUND"):
        endpoint(stub, "e", "nothing")
    with refused(InvalidArgument, "NAME_MALFORMED"):
        stub.CreateEndpoint(pb.CreateEndpointRequest(parent=WORKSPACE))
    with refused(FailedPrecondition, "MODEL_NOT_SERVABLE") as error:
        endpoint(stub, "e", "one")
    assert "merge" in error[0].message
    with refused(FailedPrecondition, "MODEL_NOT_SERVABLE"):
        endpoint(stub, "e", adapters=[("a", "other")])
    with refused(FailedPrecondition, "BASE_MISMATCH") as error:
        endpoint(stub, "e", adapters=[("a", "two")])
    assert error[0].metadata["base"] == models.other
    with refused(InvalidArgument, "ALIAS_MALFORMED") as error:
        endpoint(stub, "e", adapters=[("a", "one"), ("Not One", "one")])
    assert error[0].violations[0].field == "endpoint.adapters[1].alias"
    with refused(InvalidArgument, "ALIAS_MALFORMED"):
        endpoint(stub, "e", adapters=[("a", "one"), ("a", "one")])
    with refused(InvalidArgument, "DTYPE_UNKNOWN"):
        endpoint(stub, "e", dtype="float8")
    with refused(InvalidArgument, "BITS_UNKNOWN"):
        endpoint(stub, "e", bits=3)
    with refused(InvalidArgument, "ENGINE_UNKNOWN"):
        endpoint(stub, "e", engine="magic")
    assert endpoint(stub, "e", validate_only=True).template == "tokenizer"
    with refused(NotFound, "ENDPOINT_NOT_FOUND"):
        stub.GetEndpoint(pb.GetEndpointRequest(name=f"{WORKSPACE}/endpoints/e"))
    with refused(NotFound, "ENDPOINT_NOT_FOUND"):
        chat(stub, f"{WORKSPACE}/endpoints/e")
    with refused(InvalidArgument, "ORDER_BY_UNKNOWN"):
        stub.ListEndpoints(pb.ListEndpointsRequest(parent=WORKSPACE, order_by="colour"))
    assert not service.engines()


def test_a_whole_life(service: Service, models: Models) -> None:
    stub, request_id = service.stub, str(uuid.uuid4())
    made = endpoint(stub, "life", adapters=[("brief", "one")], labels={"team": "a"}, request_id=request_id)
    assert endpoint(stub, "life", adapters=[("brief", "one")], labels={"team": "a"}, request_id=request_id) == made
    with refused(InvalidArgument, "REQUEST_ID_REUSED"):
        endpoint(stub, "life", request_id=request_id)
    for dry in (False, True):
        with refused(AlreadyExists, "ENDPOINT_EXISTS"):
            endpoint(stub, "life", validate_only=dry)
    with refused(FailedPrecondition, "ENDPOINT_NOT_READY") as error:
        chat(stub, made.name)
    assert error[0].metadata["state"] == "STARTING"

    ready = service.wait_for(made.name, READY)
    assert ready.address.startswith("127.0.0.1:")
    assert (ready.adapters[0].digest, ready.labels["team"]) == (models.one, "a")
    text, ids, last = chat(stub, made.name)
    assert len(ids) == last.usage.completion_tokens == 12
    with grpc.insecure_channel(ready.address) as direct:
        assert chat(InferenceStub(direct), made.name)[:2] == (text, ids)
    served = stub.ListServedModels(pb.ListServedModelsRequest(parent=WORKSPACE)).models
    assert [(m.adapter, m.digest, m.context_length) for m in served] == [
        ("", models.tiny, 512),
        ("brief", models.one, 512),
    ]
    assert {m.create_time.seconds for m in served} == {ready.create_time.seconds}
    listed = stub.ListEndpoints(pb.ListEndpointsRequest(parent=WORKSPACE, filter='state = "READY"')).endpoints
    assert [e.name for e in listed] == [made.name]
    # The engine's own errors come through whole.
    with refused(InvalidArgument, "SAMPLING_INVALID") as wrong:
        chat(stub, made.name, pb.Sampling(top_p=2))
    assert wrong[0].violations[0].field == "sampling.top_p"
    with refused(InvalidArgument, "MESSAGES_EMPTY"):
        stub.Tokenize(pb.TokenizeRequest(endpoint=made.name, conversation=pb.Conversation()))

    with refused(Aborted, "ETAG_MISMATCH"):
        delete(service, made.name, "999")
    delete(service, made.name, ready.etag)
    assert not service.engines()
    with refused(NotFound, "ENDPOINT_NOT_FOUND"):
        delete(service, made.name)


@pytest.fixture(scope="module")
def shared(service: Service, models: Models) -> Iterator[str]:
    """An endpoint for several tests: an engine takes seconds to start."""
    name = endpoint(service.stub, "shared").name
    service.wait_for(name, READY)
    yield name
    delete(service, name)
    assert not service.engines()


def test_deadline_and_cancellation_reach_the_engine(service: Service, shared: str) -> None:
    name = shared
    (pid,) = service.engines()
    chat(service.stub, name)
    idle = _threads(pid)
    request = pb.ChatRequest(endpoint=name, messages=turns("hi"), sampling=pb.Sampling(temperature=0, max_tokens=480))
    with pytest.raises(grpc.RpcError) as caught:
        list(service.stub.Chat(request, timeout=0.2))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    streams = [service.stub.Chat(request) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert _threads(pid) > idle + 1
    for stream in streams:
        stream.cancel()
    until(lambda: _threads(pid) <= idle + 1, 2)


def test_an_engine_that_is_killed_is_missed_and_comes_back(service: Service, shared: str) -> None:
    name = shared
    service.wait_for(name, READY)
    (pid,) = service.engines()
    long = pb.Sampling(temperature=0, max_tokens=450)
    stream = iter(service.stub.Chat(pb.ChatRequest(endpoint=name, messages=turns("hi"), sampling=long)))
    sent = len(next(stream).token_ids)
    os.kill(pid, signal.SIGKILL)
    with refused(Unavailable, "ENGINE_LOST") as error:
        for answer in stream:
            sent += len(answer.token_ids)
    assert error[0].metadata == {"tokens_sent": str(sent)}
    # By its process, not its address: a new engine may be given the port of the old one.
    until(lambda: len(found := service.engines()) == 1 and pid not in found, 40, service.logs)
    service.wait_for(name, READY)
    assert len(chat(service.stub, name)[1]) == 12


def _threads(pid: int) -> int:
    """An engine has one for each answer that it works on, beside those that it always has."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_a_model_that_cannot_be_served_says_why(service: Service, models: Models) -> None:
    name = endpoint(service.stub, "broken", "broken").name
    failed = service.wait_for(name, FAILED)
    assert "no-such-model" in failed.error.message
    with refused(FailedPrecondition, "ENDPOINT_NOT_READY") as error:
        chat(service.stub, name)
    assert "no-such-model" in error[0].message
    delete(service, name)
    # Deleted while its engine is being born: nothing is left over.
    name = endpoint(service.stub, "short").name
    delete(service, name)
    time.sleep(0.5)
    assert len(service.engines()) <= 1  # the shared one


def test_a_service_that_is_killed_finds_its_engine_again(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a secret of the tests")
    service = Service(tmp_path, "--token-file", str(token)).start()
    publish(service.store, tmp_path / "models")
    shown = bearer("a secret of the tests")
    open_to = grpc.intercept_channel(service.channel, _Shows(shown))
    service.stub = InferenceStub(open_to)
    name = endpoint(service.stub, "kept").name
    before = service.wait_for(name, READY)
    pids = service.engines()
    service.kill()
    assert service.engines() == pids

    service.start()
    with refused(Unauthenticated, "TOKEN_MISSING"):
        service.stub.GetEndpoint(pb.GetEndpointRequest(name=name))
    with grpc.insecure_channel(before.address) as direct, refused(Unauthenticated, "TOKEN_MISSING"):
        chat(InferenceStub(direct), name)
    service.stub = InferenceStub(grpc.intercept_channel(service.channel, _Shows(shown)))
    assert service.stub.GetEndpoint(pb.GetEndpointRequest(name=name)).address == before.address
    assert len(chat(service.stub, name)[1]) == 12
    assert service.engines() == pids
    # An orderly end takes the engine along; the next start brings it back at once.
    assert service.stop() == 0
    assert not service.engines()
    service.start()
    service.stub = InferenceStub(grpc.intercept_channel(service.channel, _Shows(shown)))
    assert service.wait_for(name, READY).address
    assert service.stop() == 0
    assert not service.engines()


class _Shows(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Shows the token with every call."""

    def __init__(self, metadata: object) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation, details, request):  # type: ignore[no-untyped-def]
        return continuation(details._replace(metadata=self._metadata), request)

    intercept_unary_stream = intercept_unary_unary
