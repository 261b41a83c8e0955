"""Limits from the outside: an engine's places, its queue, deadlines, and callers that go away; and workspaces' turns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub, add_InferenceServicer_to_server

from services.common.records import Record, Records
from services.common.server import Room
from services.finetune.errors import DeadlineExceeded, ResourceExhausted
from services.finetune.store import open_store
from services.inference.engines import servicer as engine_servicer
from services.inference.keeper import KIND
from services.inference.servicer import Servicer
from services.inference.turns import Turns
from services.inference.usecases import Inference
from tests.common.serving import refused, serve
from tests.inference.conftest import until
from tests.inference.endless import Endless
from tests.inference.engines.serving import engine_server
from tests.inference.wire import turns

LONG = pb.Sampling(max_tokens=1 << 19)


@pytest.fixture()
def engine() -> Endless:
    return Endless(2)


@pytest.fixture()
def limits() -> Turns:
    return Turns(2, 2, 1)


@pytest.fixture()
def stub(engine: Endless, limits: Turns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceStub]:
    monkeypatch.setattr(engine_servicer, "Turns", lambda *numbers: limits)
    with engine_server(tmp_path, "", engine) as channel:
        yield InferenceStub(channel)


def request(workspace: str = "w", **sampling: int) -> pb.ChatRequest:
    wanted = pb.Sampling(**sampling) if sampling else LONG  # type: ignore[arg-type]
    return pb.ChatRequest(endpoint=f"workspaces/{workspace}/endpoints/e", messages=turns("hi"), sampling=wanted)


def test_so_many_answer_at_a_time_and_others_wait(engine: Endless, stub: InferenceStub, limits: Turns) -> None:
    first, second = stub.Chat(request()), stub.Chat(request())
    next(first), next(second)
    waits = stub.Chat(request())
    until(lambda: limits.waiting == 1, 60)
    with refused(ResourceExhausted, "QUEUE_FULL") as error:
        list(stub.Chat(request()))
    assert error[0].metadata["retry_after_s"]
    assert engine.going == 2
    first.cancel()
    assert next(waits).token_ids
    for call in (second, waits):
        call.cancel()
    until(lambda: engine.going == 0, 60)


def test_a_deadline_frees_the_engine_and_the_queue(engine: Endless, stub: InferenceStub) -> None:

    def late() -> None:
        with refused(DeadlineExceeded, "DEADLINE_EXCEEDED"):
            list(stub.Chat(request(), timeout=0.5))

    def begun_late() -> bool:
        late()  # on a busy machine it may be over before it begins
        return engine.begun >= 3

    until(begun_late, 60)
    until(lambda: engine.going == 0, 60)
    held = [stub.Chat(request()) for _ in range(2)]
    for call in held:
        next(call)
    begun = engine.begun
    late()  # it never has a turn
    assert engine.begun == begun
    for call in held:
        call.cancel()
    assert len(list(stub.Chat(request(max_tokens=3)))) > 0


def test_who_hangs_up_frees_the_engine(engine: Endless, tmp_path: Path) -> None:
    with engine_server(tmp_path, "", engine):
        for _ in range(3):
            # The connection itself breaks: nothing is said.
            with grpc.insecure_channel(
                f"unix:{tmp_path}/s", options=[("grpc.use_local_subchannel_pool", 1)]
            ) as channel:
                call = InferenceStub(channel).Chat(request())
                next(call)
        until(lambda: engine.going == 0, 60)
        assert engine.begun == 3


@contextlib.contextmanager
def service(home: Path, address: str, turns: Turns) -> Iterator[InferenceStub]:
    """The inference service with an endpoint `e` in the workspaces a and b, whose engine is at `address`."""
    records = Records(f"sqlite:///{home}/records.db")
    for workspace in "ab":
        body = {"spec": {}, "address": address}
        records.create(Record(f"workspaces/{workspace}/endpoints/e", KIND, "READY", body), "", "")
    inference = Inference(open_store((home / "store").as_uri()), records)
    servicer = Servicer(inference, "", turns)
    room = Room("quartet.inference.v1.Inference", lambda server: add_InferenceServicer_to_server(servicer, server))
    home.joinpath("service").mkdir()
    with serve(room, home / "service") as channel:
        yield InferenceStub(channel)


def test_workspaces_have_places_of_their_own(tmp_path: Path) -> None:
    engine, limits = Endless(99), Turns(most=2, each=1, queue=1)
    with engine_server(tmp_path, "", engine), service(tmp_path, f"unix:{tmp_path}/s", limits) as stub:
        first = stub.Chat(request("a"))
        next(first)
        waits = stub.Chat(request("a"))
        until(lambda: limits.waiting == 1, 60)
        with refused(ResourceExhausted, "QUEUE_FULL") as error:
            list(stub.Chat(request("a")))
        assert "workspaces/a" in error[0].message
        other = stub.Chat(request("b"))
        assert next(other).token_ids and engine.going == 2
        first.cancel()
        assert next(waits).token_ids
        for call in (waits, other):
            call.cancel()
        until(lambda: engine.going == 0 and limits.running == 0, 60)
