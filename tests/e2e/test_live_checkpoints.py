"""Checkpoints of a job that still runs become adapters that answer, one after another, under one alias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from quartet.conversion.v1 import conversion_pb2
from quartet.inference.v1 import inference_pb2 as pb

from services.client.client import Client
from tests.e2e.stack import Stack
from tests.e2e.test_pause import tiny

__all__ = ["tiny"]
OPTIONS = {"schedule.max_steps": 1_000_000, "data.max_length": 64, "lora.rank": 2, "optim.lr": 1e-2}


@pytest.fixture()
def client(tiny: Stack) -> Iterator[Client]:
    with Client(tiny.address) as made:
        yield made


@pytest.mark.slow
def test_a_running_jobs_checkpoints_are_served(tiny: Stack, client: Client) -> None:
    endpoint = client.serve("tiny", endpoint_id="live").name
    more: dict[str, Any] = {"report.checkpoint_every": 20, "report.keep_last": 0}
    job = client.train("smollm2_135m_lora_assistant_e1", "tiny", ["d"], {**OPTIONS, **more}).name
    served = list[str]()
    for event in client.watch(job):
        if event.WhichOneof("event") != "checkpoint":
            continue
        target = f"step-{event.checkpoint.step}"
        made = client.convert(target, adapter=conversion_pb2.AdapterTask(checkpoint=event.checkpoint.name))
        assert [e.state.state for e in client.watch(made.name)][-1] == conversion_pb2.ConversionJob.SUCCEEDED
        adapter = pb.ServedAdapter(alias="newest", model=client.name("models", target))
        client.inference.LoadAdapter(pb.LoadAdapterRequest(endpoint=endpoint, adapter=adapter))
        said = "".join(
            p.text for p in client.chat(endpoint, [("user", "say 1")], "newest", temperature=0, max_tokens=8)
        )
        served.append(said)
        assert client.job(job).state == client.job(job).RUNNING
        if len(served) == 3:
            break
    client.cancel(job)
    client.inference.DeleteEndpoint(pb.DeleteEndpointRequest(name=endpoint))
