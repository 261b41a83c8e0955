"""The protocol between workers and services over the store: the fence, claims, segments, outcomes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from services.finetune import progress
from services.finetune.errors import Unavailable
from services.finetune.progress import Attempt, Fenced, Outcome
from services.finetune.store import Store

JOB = "jobs/default.j1"
Start = Callable[[int], Attempt]


@pytest.fixture()
def start(store: Store) -> Iterator[Start]:
    """Raise the fence to an attempt and claim it; workers end with the test."""
    with ExitStack() as stack:

        def started(number: int) -> Attempt:
            assert progress.raise_fence(store, JOB, number) is None
            attempt = Attempt(store, JOB, number)
            attempt.claim({"host": "h", "pid": number})
            return stack.enter_context(attempt)

        yield started


def outcome(text: str = "sha256:a") -> Outcome:
    return Outcome("SUCCEEDED", {"model": text})


def test_outcome_is_published_once(store: Store, start: Start) -> None:
    attempt = start(1)
    assert progress.read_outcome(store, JOB) is None
    attempt.publish(outcome())
    assert progress.read_outcome(store, JOB) == (1, outcome())
    with pytest.raises(Fenced):
        attempt.publish(outcome("sha256:b"))
    assert progress.read_outcome(store, JOB) == (1, outcome())


def test_zombie_changes_nothing(store: Store, start: Start) -> None:
    zombie = start(1)
    zombie.checkpoint(10, "sha256:ten", 2.0)
    successor = start(2)
    for act in (
        zombie.check,
        lambda: zombie.checkpoint(20, "sha256:twenty", 1.0),
        lambda: zombie.publish(outcome("sha256:zombie")),
    ):
        with pytest.raises(Fenced) as error:
            act()
        assert error.value.reason == "ATTEMPT_FENCED"
    assert progress.newest_checkpoint(store, JOB, 2) == (10, "sha256:ten")
    successor.publish(outcome("sha256:successor"))
    assert progress.read_outcome(store, JOB) == (2, outcome("sha256:successor"))


def test_what_a_predecessor_published_stands(store: Store, start: Start) -> None:
    start(1).publish(outcome("sha256:first"))
    assert progress.raise_fence(store, JOB, 2) == outcome("sha256:first")
    with pytest.raises(Fenced):
        Attempt(store, JOB, 2).claim({"pid": 1})


def test_fence_never_goes_back(store: Store) -> None:
    assert progress.raise_fence(store, JOB, 2) is None
    assert progress.raise_fence(store, JOB, 2) is None
    with pytest.raises(Fenced):
        progress.raise_fence(store, JOB, 1)


def test_second_claim_of_an_attempt_is_fenced(store: Store, start: Start) -> None:
    start(1)
    with pytest.raises(Fenced):
        Attempt(store, JOB, 1).claim({"host": "other", "pid": 2})
    assert progress.read_claim(store, JOB, 1) == {"host": "h", "pid": 1}
    assert progress.read_claim(store, JOB, 2) is None


def test_claim_without_a_lease_is_fenced(store: Store) -> None:
    with pytest.raises(Fenced):
        Attempt(store, JOB, 1).claim({"pid": 1})


@pytest.mark.parametrize("turn", range(3))
def test_publish_races_the_next_attempt(store: Store, start: Start, turn: int) -> None:
    """Either the old attempt's outcome stands and the service hears of it, or the new attempt owns the job."""
    zombie = start(1)
    gate = threading.Barrier(2)
    heard: list[Outcome | None] = []
    published: list[bool] = []

    def publish() -> None:
        gate.wait()
        try:
            zombie.publish(outcome("sha256:zombie"))
            published.append(True)
        except Fenced:
            published.append(False)

    def fence() -> None:
        gate.wait()
        time.sleep(0.002 * turn)
        heard.append(progress.raise_fence(store, JOB, 2))

    threads = [threading.Thread(target=publish), threading.Thread(target=fence)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if published == [True]:
        assert heard == [outcome("sha256:zombie")]
        assert progress.read_outcome(store, JOB) == (1, outcome("sha256:zombie"))
    else:
        assert published == [False] and heard == [None]
        assert progress.read_outcome(store, JOB) is None
        start_second = Attempt(store, JOB, 2)
        assert start_second.check()


def test_of_two_processes_one_publishes(store: Store, start: Start) -> None:
    """Two processes that both believe in the same attempt: the lease takes one outcome."""
    first = start(1)
    twin = Attempt(store, JOB, 1)
    gate = threading.Barrier(2)
    won: list[str] = []

    def publish(attempt: Attempt, text: str) -> None:
        gate.wait()
        try:
            attempt.publish(outcome(text))
            won.append(text)
        except Fenced:
            pass

    threads = [threading.Thread(target=publish, args=pair) for pair in ((first, "sha256:1"), (twin, "sha256:2"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and progress.read_outcome(store, JOB) == (1, outcome(won[0]))


def test_events_come_in_segments_and_in_order(store: Store, start: Start) -> None:
    attempt = start(1)
    for step in range(5):
        attempt.emit("metric", step=step, values={"loss": 1.5})
        if step % 2:
            attempt.flush()
    attempt.emit("log", level="info", text="Grüße")
    attempt.close()
    segments = list(progress.read_segments(store, JOB, 1, -1))
    assert [number for number, _ in segments] == list(range(len(segments))) and len(segments) >= 2
    events = [event for _, found in segments for event in found]
    assert [e["step"] for e in events if e["type"] == "metric"] == [0, 1, 2, 3, 4]
    assert events[-1]["text"] == "Grüße" and events[0]["time"] <= events[-1]["time"]
    assert list(progress.read_segments(store, JOB, 1, 0)) == segments[1:]
    assert list(progress.read_segments(store, JOB, 1, segments[-1][0])) == []
    assert list(progress.read_segments(store, JOB, 2, -1)) == []


def test_events_arrive_without_a_flush(store: Store, start: Start) -> None:
    start(1).emit("log", level="info", text="hello")
    deadline = time.monotonic() + progress.FLUSH_S + 5
    while not (found := list(progress.read_segments(store, JOB, 1, -1))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [e["text"] for _, events in found for e in events] == ["hello"]


def test_events_outlive_a_store_that_is_away(file_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    progress.raise_fence(file_store, JOB, 1)
    with Attempt(file_store, JOB, 1) as attempt:
        attempt.claim({"pid": 1})
        with monkeypatch.context() as away:
            away.setattr(file_store, "put", unavailable)
            attempt.emit("log", level="info", text="kept")
            with pytest.raises(Unavailable):
                attempt.flush()
        attempt.flush()
    events = [e["text"] for _, found in progress.read_segments(file_store, JOB, 1, -1) for e in found]
    assert events == ["kept"]


def unavailable(*_: object, **__: object) -> str:
    raise Unavailable("away", reason="STORE_UNREACHABLE")


def test_newest_checkpoint_of_earlier_attempts(store: Store, start: Start) -> None:
    assert progress.newest_checkpoint(store, JOB, 1) is None
    start(1).checkpoint(10, "sha256:ten", 2.0)
    second = start(2)
    second.checkpoint(9, "sha256:nine", 2.0)
    second.checkpoint(100, "sha256:hundred", 1.0)
    start(3).checkpoint(500, "sha256:own", 1.0)
    assert progress.newest_checkpoint(store, JOB, 3) == (100, "sha256:hundred")
    assert progress.newest_checkpoint(store, JOB, 2) == (10, "sha256:ten")


@pytest.mark.parametrize("uri", ["file:///a/b", "s3://bucket/prefix?endpoint=http://h:1&region=r"])
def test_run_uri(uri: str) -> None:
    assert progress.split_run_uri(progress.run_uri(uri, "jobs/x.y", 12)) == (uri, "jobs/x.y", 12)
    with pytest.raises(ValueError, match="not the URI of a run"):
        progress.split_run_uri(uri)
