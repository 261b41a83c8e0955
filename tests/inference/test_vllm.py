"""An endpoint on vLLM, from its start to deaths of every process of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import Unavailable
from tests.common.serving import refused
from tests.inference import published
from tests.inference.conftest import READY, Service, until
from tests.inference.wire import GREEDY, endpoint, turns, whole

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose endpoints are on vLLM unless they name another engine; `wide` has adapters `first` and `second`."""
    running = Service(tmp_path_factory.mktemp("v"), "--engine", "vllm").start()
    root = tmp_path_factory.mktemp("models")
    base = published.wide_model(root / "wide")
    digest = published.model(running.store, base, "wide")
    for seed, name in enumerate(("first", "second"), 1):
        published.adapter(running.store, published.tiny_adapter(base, root / name, seed), name, digest)
    yield running
    assert running.stop() == 0, running.logs()
    until(lambda: not running.engines() and not cores())


def cores() -> list[int]:
    """Pids of vLLM's own processes."""
    names = {p.parent: p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()}
    return [int(p.name) for p, name in names.items() if name.startswith(b"VLLM::EngineCore")]


def ask(service: Service, name: str, adapter: str = "", sampling: pb.Sampling = GREEDY) -> tuple[str, list[int]]:
    request = pb.ChatRequest(endpoint=name, adapter=adapter, messages=turns("hi"), sampling=sampling)
    return whole(service.stub.Chat(request))[:2]


def test_both_engines_give_the_same_answers_and_both_change_adapters_while_they_answer(serving: Service) -> None:
    fast = endpoint(serving.stub, "fast", "wide", adapters=[("a", "first")], dtype="float32")
    slow = endpoint(serving.stub, "slow", "wide", adapters=[("a", "first")], dtype="float32", engine="transformers")
    assert (fast.engine, slow.engine) == ("vllm", "transformers")
    for made in (fast, slow):
        serving.wait_for(made.name, READY, 180)
    bare, old = ask(serving, slow.name), ask(serving, slow.name, "a")
    assert (ask(serving, fast.name), ask(serving, fast.name, "a")) == (bare, old)

    long = pb.ChatRequest(
        endpoint=fast.name, adapter="a", messages=turns("hi"), sampling=pb.Sampling(temperature=0, max_tokens=400)
    )
    alone = whole(serving.stub.Chat(long))[1]
    under_way = serving.stub.Chat(long)
    began = list(next(under_way).token_ids)
    for made in (fast, slow):
        second = pb.ServedAdapter(alias="a", model=f"{published.WORKSPACE}/models/second")
        serving.stub.LoadAdapter(pb.LoadAdapterRequest(endpoint=made.name, adapter=second))
    new = ask(serving, slow.name, "a")
    assert new != old
    assert ask(serving, fast.name, "a") == new
    assert began + whole(under_way)[1] == alone
    serving.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=slow.name))


@pytest.mark.parametrize("victim", ["the model's process", "the engine server"])
def test_whichever_process_is_killed_the_endpoint_comes_back_and_nothing_is_left(serving: Service, victim: str) -> None:
    made = endpoint(serving.stub, "mortal", "wide")
    serving.wait_for(made.name, READY, 180)
    before, servers = set(cores()), set(serving.engines())
    text = ask(serving, made.name)
    newest = max(serving.engines(), key=lambda pid: Path(f"/proc/{pid}").stat().st_ctime)
    core = next(pid for pid in before if f"\nPPid:\t{newest}\n" in Path(f"/proc/{pid}/status").read_text())
    request = pb.ChatRequest(
        endpoint=made.name, messages=turns("hi"), sampling=pb.Sampling(temperature=0, max_tokens=1900)
    )
    stream = iter(serving.stub.Chat(request))
    sent = len(next(stream).token_ids)
    os.kill(core if victim == "the model's process" else newest, signal.SIGKILL)
    with refused(Unavailable, "ENGINE_LOST") as error:
        for answer in stream:
            sent += len(answer.token_ids)
    assert error[0].metadata == {"tokens_sent": str(sent)}
    until(lambda: set(serving.engines()) not in (servers, servers - {newest}), 60, serving.logs)
    serving.wait_for(made.name, READY, 180)
    assert ask(serving, made.name) == text
    until(lambda: core not in cores() and newest not in serving.engines())
    serving.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=made.name))
    until(lambda: len(cores()) == len(before) - 1)
