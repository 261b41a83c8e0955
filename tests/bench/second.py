"""The second job on the same data: it finds what the first prepared. The peer is the first."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import grpc
from quartet.datasets.v1 import datasets_pb2 as pb
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub

from services.finetune.store import open_store
from tests.datasets.test_preparing import put_model
from tests.datasets.wire import commit, new, row
from tests.e2e.stack import Stack

ROWS = 20_000


def bench_second(rounds: int = 5) -> tuple[list[float], list[float]]:
    """Seconds from the request to SUCCEEDED, of first and second requests in turn; each round has another seed."""
    first, second = [], []
    with tempfile.TemporaryDirectory() as home:
        stack = Stack(Path(home)).start()
        datasets = DatasetsStub(grpc.insecure_channel(stack.address))
        model = put_model(open_store((Path(home) / "store").as_uri()), "tiny", Path(home) / "tiny")
        data = b"".join(row(f"What is {n} times {n}?", f"It is {n * n}.") for n in range(ROWS))
        revision = commit(datasets, new(datasets), {"a.jsonl": data}).name
        for seed in range(rounds):
            first.append(_seconds(datasets, revision, model, seed, "workspaces/one"))
            second.append(_seconds(datasets, revision, model, seed, "workspaces/two"))
        stack.stop()
    return first, second


def _seconds(datasets: DatasetsStub, revision: str, model: str, seed: int, parent: str) -> float:
    request = pb.PrepareDatasetRequest(
        parent=parent, sources=[pb.PrepareSource(revision=revision)], model=model, seed=seed
    )
    began = time.monotonic()
    made = datasets.PrepareDataset(request)
    for event in datasets.WatchPreparedDataset(pb.WatchPreparedDatasetRequest(name=made.name)):
        if event.state.state == pb.SUCCEEDED:
            return time.monotonic() - began
    raise AssertionError(f"{made.name} did not succeed")
