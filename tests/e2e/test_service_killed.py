"""kill -9 of the whole service process at ten points of a job: it still succeeds, once, with gap-free events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.stack import Stack
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home that has a tiny random model and a dataset; each test works on the same one."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_model(folder / "tiny")
    rows = folder / "rows.jsonl"
    with rows.open("w") as out:
        for n in range(64):
            turns = [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} it is"}]
            out.write(json.dumps({"messages": turns}) + "\n")
    stack = Stack(folder / "home").start()
    for words in (["model", "import", str(folder / "tiny"), "--name", "tiny"], ["dataset", "create", "d", str(rows)]):
        done = stack.quartet(*words)
        assert done.returncode == 0, done.stderr
    stack.stop()
    return folder / "home"


def after(seconds: float) -> Callable[[Stack, str], None]:
    return lambda stack, job: time.sleep(seconds)


def once(kind: str, count: int) -> Callable[[Stack, str], None]:
    """Wait until `count` events of a kind are visible."""

    def wait(stack: Stack, job: str) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if sum(kind in event for event in events(stack, job)) >= count:
                return
            time.sleep(0.05)
        raise AssertionError(f"no {count} {kind} events of {job}")

    return wait


POINTS = {
    "at-once": after(0.0),
    "queued": after(0.1),
    "launching": after(0.4),
    "worker-importing": after(1.5),
    "running": once("state", 3),
    "first-metric": once("metric", 1),
    "first-checkpoint": once("checkpoint", 1),
    "later-metric": once("metric", 6),
    "later-checkpoint": once("checkpoint", 3),
    "near-the-end": once("checkpoint", 5),
}


def events(stack: Stack, job: str) -> list[dict[str, object]]:
    done = stack.quartet("job", "logs", job, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


QUICK = ("launching", "worker-importing", "first-checkpoint", "later-metric", "near-the-end")


@pytest.mark.parametrize("point", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in POINTS])
def test_job_succeeds_after_kill(home: Path, point: str) -> None:
    stack = Stack(home).start()
    job = f"killed-{point}"
    options = ["schedule.epochs=6", "report.log_every=1", "report.checkpoint_every=4", "data.max_length=64"]
    words = ["train", "smollm2_135m_lora_assistant_e1", "--base", "tiny", "--data", "d", "--name", job, "--detach"]
    made = stack.quartet(*words, "--cfg-options", *options, "lora.rank=2")
    assert made.returncode == 0, made.stderr
    POINTS[point](stack, job)
    stack.kill()
    stack.start()
    try:
        watched = stack.quartet("job", "watch", job, "--json")
        assert watched.returncode == 0, (watched.stdout, watched.stderr)
        seen = events(stack, job)
        assert [e["sequence"] for e in seen] == list(range(1, len(seen) + 1))
        states = [e["state"]["state"] for e in seen if "state" in e]  # type: ignore[index]
        assert states[-1] == "SUCCEEDED" and states.count("SUCCEEDED") == 1
        listed = json.loads(stack.quartet("job", "list", "--json").stdout)["jobs"]
        assert sum(str(j["name"]).endswith("/" + job) for j in listed) == 1
    finally:
        stack.stop()
