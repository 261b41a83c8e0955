"""More adapters than the engine holds, and one alias that goes over again and again while others ask."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.finetune.store import open_store
from services.inference.engines.transformers import TransformersEngine
from tests.inference import published
from tests.inference.conftest import until
from tests.inference.engines.serving import engine_server
from tests.inference.wire import GREEDY, turns, whole
from tests.tiny import tiny_model

COUNT = 4
ROUNDS = 500


class Counting(TransformersEngine):
    """Counts what is loaded, and the most that ever was."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, {}, "float32", 0)
        self.most_adapters = 2
        self.held: set[str] = set()
        self.peak = self.loads = 0

    def load(self, key: str, folder: Path) -> None:
        super().load(key, folder)
        self.held.add(key)
        self.peak, self.loads = max(self.peak, len(self.held)), self.loads + 1

    def unload(self, key: str) -> None:
        super().unload(key)
        self.held.remove(key)


@dataclass
class Running:
    engine: Counting
    stub: InferenceStub
    digests: list[str]

    def put(self, alias: str, n: int) -> None:
        adapter = pb.ServedAdapter(alias=alias, model=f"m{n}", digest=self.digests[n])
        self.stub.LoadAdapter(pb.LoadAdapterRequest(adapter=adapter))

    def ask(self, alias: str) -> list[int]:
        return whole(self.stub.Chat(pb.ChatRequest(adapter=alias, messages=turns("hi"), sampling=GREEDY)))[1]

    def drop(self, alias: str) -> None:
        self.stub.UnloadAdapter(pb.UnloadAdapterRequest(alias=alias))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("h")
    engine = Counting(tiny_model(home / "model", context_length=2048))
    with engine_server(home, "", engine) as channel:
        stub, store = InferenceStub(channel), open_store((home / "store").as_uri())
        base = stub.ListServedModels(pb.ListServedModelsRequest()).models[0].digest
        made = [published.tiny_adapter(home / "model", home / f"a{n}", n) for n in range(COUNT)]
        digests = [published.adapter(store, folder, f"a{n}", base) for n, folder in enumerate(made)]
        yield Running(engine, stub, digests)


def test_what_was_used_longest_ago_leaves_and_comes_back(running: Running) -> None:
    engine = running.engine
    for n in range(COUNT):
        running.put(f"a{n}", n)
    first = [running.ask(f"a{n}") for n in range(COUNT)]
    assert len({tuple(ids) for ids in first}) == COUNT and engine.peak == 2
    served = [m.adapter for m in running.stub.ListServedModels(pb.ListServedModelsRequest()).models]
    assert served == ["", *(f"a{n}" for n in range(COUNT))]
    running.ask("a2")  # so that a3 is older
    loads = engine.loads
    assert running.ask("a2") == first[2] and engine.loads == loads
    assert running.ask("a0") == first[0] and engine.loads == loads + 1
    assert running.ask("a2") == first[2] and engine.loads == loads + 1
    assert [running.ask(f"a{n}") for n in range(COUNT)] == first and engine.peak == 2
    for n in range(COUNT):
        running.drop(f"a{n}")
    until(lambda: not engine.held, 60)


def test_what_answers_is_not_let_go_of(running: Running) -> None:
    for n in range(COUNT):
        running.put(f"a{n}", n)
    alone = running.ask("a0")
    long = pb.Sampling(temperature=0, max_tokens=300)
    call = running.stub.Chat(pb.ChatRequest(adapter="a0", messages=turns("hi"), sampling=long))
    begun = next(iter(call))
    for n in (1, 2, 3, 1, 2, 3):
        running.ask(f"a{n}")
    ids = [*begun.token_ids, *whole(call)[1]]
    assert ids[: len(alone)] == alone and len(ids) == 300
    for n in range(COUNT):
        running.drop(f"a{n}")


@pytest.mark.slow
def test_an_alias_that_goes_over_500_times_never_answers_with_an_old_version(running: Running) -> None:
    running.put("v", 0)
    wanted: list[Any] = []
    for n in range(COUNT):
        running.put("v", n)
        wanted.append(running.ask("v"))
    assert len({tuple(ids) for ids in wanted}) == COUNT
    ended, mixed, heard = threading.Event(), list[list[int]](), [0]

    def listen() -> None:
        while not ended.is_set():
            ids = running.ask("v")
            heard[0] += 1
            if ids not in wanted:
                mixed.append(ids)

    listeners = [threading.Thread(target=listen) for _ in range(3)]
    for thread in listeners:
        thread.start()
    old = 0
    for n in range(ROUNDS):
        running.put("v", n % COUNT)
        old += running.ask("v") != wanted[n % COUNT]
    ended.set()
    for thread in listeners:
        thread.join()
    assert (old, mixed) == (0, []) and heard[0] > ROUNDS
    assert running.engine.peak <= 6  # one for each that answers, and what is being loaded
    running.drop("v")
