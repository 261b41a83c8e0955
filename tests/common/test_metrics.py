"""What Prometheus is told."""

from __future__ import annotations

import asyncio
import socket
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from quartet.inference.v1 import inference_pb2 as pb

from services.common.metrics import Answers, Metrics
from services.common.records import Record, Records
from services.common.server import Room
from services.finetune.errors import InvalidArgument, Unavailable
from tests.common.test_server import Probe, call, error_of, refused_start

LABELS = ("service", "method", "code", "kind", "state", "of", "end")
Told = dict[tuple[str, ...], float]


def scrape(port: int) -> dict[str, Told]:
    """Sample name -> label values -> value."""
    found: dict[str, Told] = {}
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                labels = tuple(sample.labels[name] for name in LABELS if name in sample.labels)
                found.setdefault(sample.name, {})[labels] = sample.value
    return found


@pytest.fixture()
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    return free


def test_calls_are_counted_by_their_code(tmp_path: Path, port: int) -> None:
    probe = Probe(tmp_path, "--metrics-port", str(port))
    service = "quartet.probe.v1.Probe"
    with grpc.insecure_channel(probe.address) as channel:
        for _ in range(3):
            call(channel, "unary_unary", b"ok")
        call(channel, "unary_stream", b"ok")
        assert isinstance(error_of(channel, "unary_unary", b"bad"), InvalidArgument)
        error_of(channel, "stream_stream", b"bug")
    wanted = {
        (service, "unary_unary", "OK"): 3,
        (service, "unary_unary", "INVALID_ARGUMENT"): 1,
        (service, "unary_stream", "OK"): 1,
        (service, "stream_stream", "INTERNAL"): 1,
    }
    # An error is on its way to the caller a moment before it is counted.
    deadline = time.monotonic() + 20
    while (told := scrape(port))["quartet_rpcs_total"] != wanted:
        assert time.monotonic() < deadline, told
        time.sleep(0.02)
    assert told["quartet_rpc_seconds_count"][service, "unary_unary"] == 4
    assert "port" in refused_start(tmp_path / "other", "--port", "0", "--metrics-port", str(port))
    assert probe.stop() == 0


def test_jobs_are_counted_by_their_state(database_url: str, port: int) -> None:
    def away() -> dict[tuple[str, str], int]:
        raise Unavailable("the database does not answer", reason="DATABASE_UNAVAILABLE")

    records = Records(database_url)
    for n, (kind, state) in enumerate([("trainingJob", "RUNNING"), ("trainingJob", "RUNNING"), ("x", "RUNNING")]):
        records.create(Record(f"workspaces/w/{kind}s/{n}", kind, state, {}))
    close = Metrics().listen("127.0.0.1", port, [lambda: records.counts("trainingJob"), away])
    try:
        assert scrape(port)["quartet_resources"] == {("trainingJob", "RUNNING"): 2}
    finally:
        close()
        records.close()
    assert Room("x", lambda server: None).counts() == {}


async def answer(
    *pieces: list[int], finish: pb.FinishReason.ValueType = pb.FINISH_REASON_UNSPECIFIED, fails: bool = False
) -> AsyncIterator[pb.ChatResponse]:
    for ids in pieces:
        yield pb.ChatResponse(token_ids=ids)
    if fails:
        raise Unavailable("the engine was lost", reason="ENGINE_LOST")
    usage = pb.Usage(prompt_tokens=7, completion_tokens=sum(map(len, pieces)))
    yield pb.ChatResponse(finish_reason=finish, usage=usage)


def test_answers_are_measured_and_pass_unchanged() -> None:
    answers = Answers()
    registry = CollectorRegistry()
    for collector in answers.collectors:
        registry.register(collector)

    def told(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"quartet_{name}", labels)

    async def ask() -> None:
        passed = [p async for p in answers.counted(answer([1], [2, 3], [], finish=pb.FINISH_REASON_LENGTH))]
        assert [list(p.token_ids) for p in passed] == [[1], [2, 3], [], []]
        _ = [p async for p in answers.counted(answer([1, 2], finish=pb.FINISH_REASON_STOP))]
        with pytest.raises(Unavailable):
            _ = [p async for p in answers.counted(answer([1], fails=True))]
        with pytest.raises(Unavailable):
            _ = [p async for p in answers.counted(answer(fails=True))]
        async with aclosing(answers.counted(answer([1], [2]))) as cut:  # type: ignore[type-var]  # it is a generator
            assert told("answers_waiting") == told("answers_running") == 0
            await anext(cut)
            assert (told("answers_waiting"), told("answers_running")) == (0, 1)

    asyncio.run(ask())
    assert told("first_token_seconds_count") == 4 and told("token_seconds_count") == 1
    assert (told("tokens_total", of="answer"), told("tokens_total", of="prompt")) == (7, 14)
    ends = {end: told("answers_total", end=end) for end in ("stop", "length", "error", "cancelled")}
    assert ends == {"stop": 1, "length": 1, "error": 2, "cancelled": 1}
    assert told("answers_waiting") == told("answers_running") == 0
