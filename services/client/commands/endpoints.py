"""endpoint."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from quartet.inference.v1 import inference_pb2

from services.client.commands import connect, short_name
from services.client.retry import pages
from services.client.show import out, plain, table


def create(a: Namespace) -> None:
    adapters = _pairs(a.adapter)
    with connect(a) as client:
        endpoint = client.serve(a.model, adapters, endpoint_id=a.name, bits=a.bits, dtype=a.dtype, engine=a.engine)
    out(plain(endpoint)) if a.json else print(f"{endpoint.name} answers at {endpoint.address}")


def list_all(a: Namespace) -> None:
    with connect(a) as client:
        request = inference_pb2.ListEndpointsRequest(parent=client.parent)
        found = list(pages(client.inference.ListEndpoints, request, "endpoints"))
    if a.json:
        out({"endpoints": [plain(e) for e in found]})
        return
    table(["endpoint", "state", "model"], [(e.name, plain(e)["state"], e.model) for e in found])


def get(a: Namespace) -> None:
    with connect(a) as client:
        name = client.name("endpoints", a.target)
        request = inference_pb2.GetEndpointRequest(name=name)
        out(plain(client.wait_ready(name) if a.wait else client.inference.GetEndpoint(request)))


def update(a: Namespace) -> None:
    with connect(a) as client:
        name = client.name("endpoints", a.target)
        endpoint = client.inference.GetEndpoint(inference_pb2.GetEndpointRequest(name=name))
        for alias, model in _pairs(a.adapter).items():
            adapter = inference_pb2.ServedAdapter(alias=alias, model=client.name("models", model))
            endpoint = client.inference.LoadAdapter(inference_pb2.LoadAdapterRequest(endpoint=name, adapter=adapter))
        for alias in a.drop_adapter:
            endpoint = client.inference.UnloadAdapter(inference_pb2.UnloadAdapterRequest(endpoint=name, alias=alias))
    if a.json:
        out(plain(endpoint))
        return
    table(["alias", "adapter"], [(served.alias, served.model) for served in endpoint.adapters])


def delete(a: Namespace) -> None:
    with connect(a) as client:
        name = client.name("endpoints", a.target)
        client.inference.DeleteEndpoint(inference_pb2.DeleteEndpointRequest(name=name))
    out({"deleted": name}) if a.json else print(f"{name} is stopped")


def _pairs(given: Sequence[str]) -> dict[str, str]:
    """Models by alias, from ALIAS=MODEL or MODEL alone."""
    cut = [pair.partition("=") for pair in given]
    return {head if model else _alias(head): model or head for head, _, model in cut}


def _alias(model: str) -> str:
    return short_name(model.rpartition("/")[2])
