"""The inference room's wire: endpoints by use-cases; Chat, Generate and Tokenize passed on to the engine server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2, health_pb2_grpc
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceServicer, InferenceStub

from services.common import auth, requests, wire
from services.common.metrics import Answers
from services.common.records import Record
from services.common.status import from_rpc_error
from services.finetune.errors import QuartetError, Unavailable
from services.inference.adapters import Adapter
from services.inference.turns import Turns
from services.inference.usecases import Inference

PAGING = ("page_size", "page_token", "filter", "order_by")
HEALTH_S = 2.0
LOAD_S = 600.0
# What gRPC itself says of a server that vanishes. The engine's own errors have our details beside the code.
LOST = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


class Servicer(InferenceServicer):
    """See the proto. `token` is shown to the engines, which want the service's own."""

    def __init__(self, inference: Inference, token: str, turns: Turns) -> None:
        self._inference = inference
        self._turns = turns  # of workspaces
        self._metadata = tuple(auth.bearer(token)) if token else ()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self.answers = Answers()

    def CreateEndpoint(self, request: pb.CreateEndpointRequest, context: Any) -> pb.Endpoint:
        given = request.endpoint
        spec = {
            "display_name": given.display_name,
            "model": given.model,
            "adapters": [{"alias": a.alias, "model": a.model} for a in given.adapters],
            "engine": given.engine,
            "dtype": given.dtype,
            "bits": given.bits,
            "labels": dict(given.labels),
        }
        asked = (request.request_id, wire.fingerprint(request))
        return _endpoint(
            self._inference.create(request.parent, request.endpoint_id, spec, asked, request.validate_only)
        )

    def GetEndpoint(self, request: pb.GetEndpointRequest, context: Any) -> pb.Endpoint:
        return _endpoint(self._inference.get(request.name))

    def ListEndpoints(self, request: pb.ListEndpointsRequest, context: Any) -> pb.ListEndpointsResponse:
        paging = {name: getattr(request, name) for name in PAGING}
        found, token = self._inference.list(request.parent, **paging)
        return pb.ListEndpointsResponse(endpoints=[_endpoint(r) for r in found], next_page_token=token)

    def DeleteEndpoint(self, request: pb.DeleteEndpointRequest, context: Any) -> Empty:
        self._inference.delete(request.name, request.etag)
        return Empty()

    def LoadAdapter(self, request: pb.LoadAdapterRequest, context: Any) -> pb.Endpoint:
        adapter = request.adapter
        return _endpoint(self._inference.load_adapter(request.endpoint, adapter.alias, adapter.model, request.etag))

    def UnloadAdapter(self, request: pb.UnloadAdapterRequest, context: Any) -> pb.Endpoint:
        return _endpoint(self._inference.unload_adapter(request.endpoint, request.alias, request.etag))

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for answer in self.answers.counted(self._pass_on("Generate", request, context)):
            yield answer

    async def Chat(self, request: pb.ChatRequest, context: Any) -> AsyncIterator[pb.ChatResponse]:
        async for answer in self.answers.counted(self._pass_on("Chat", request, context)):
            yield answer

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        async with self._turns.turn(_workspace(request)):
            answer: pb.EmbedResponse = await self._passed_on("Embed", request, context)
        return answer

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        answer: pb.TokenizeResponse = await self._passed_on("Tokenize", request, context)
        return answer

    async def _passed_on(self, method: str, request: Any, context: Any) -> Any:
        """The engine's one answer."""
        address = await asyncio.to_thread(self._inference.address, request.endpoint)
        send = getattr(self._engine(address), method)
        metadata = (*self._metadata, *requests.along(requests.given(context.invocation_metadata())))
        try:
            return await send(request, timeout=context.time_remaining(), metadata=metadata)
        except grpc.aio.AioRpcError as error:
            raise self._understood(error, address, 0) from error

    def ListServedModels(self, request: pb.ListServedModelsRequest, context: Any) -> pb.ListServedModelsResponse:
        return pb.ListServedModelsResponse(
            models=[m for r in self._inference.ready(request.parent) for m in _served(r)]
        )

    async def _pass_on(self, method: str, request: Any, context: Any) -> AsyncIterator[Any]:
        """Stream from the engine, once it is the workspace's turn; deadline, cancellation and request id go along, and so
        does the engine's own error."""
        async with self._turns.turn(_workspace(request)):
            async for answer in self._streamed(method, request, context):
                yield answer

    async def _streamed(self, method: str, request: Any, context: Any) -> AsyncIterator[Any]:
        address = await asyncio.to_thread(self._inference.address, request.endpoint)
        send = getattr(self._engine(address), method)
        metadata = (*self._metadata, *requests.along(requests.given(context.invocation_metadata())))
        call = send(request, timeout=context.time_remaining(), metadata=metadata)
        sent = 0
        try:
            async for answer in call:
                sent += len(answer.token_ids)
                yield answer
        except grpc.aio.AioRpcError as error:
            raise self._understood(error, address, sent) from error
        finally:
            call.cancel()

    def _engine(self, address: str) -> Any:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address)
        return InferenceStub(self._channels[address])

    def _understood(self, error: grpc.aio.AioRpcError, address: str, sent: int) -> grpc.aio.AioRpcError | QuartetError:
        """The engine's own error as it came; ENGINE_LOST if there is no engine any more."""
        if error.code() not in LOST or _has_details(error):
            return error
        # The next engine has another address; other calls on this channel meet the same end.
        self._channels.pop(address, None)
        return Unavailable(
            f"the engine was lost after {sent} tokens; it is started again, so ask again soon",
            reason="ENGINE_LOST",
            metadata={"tokens_sent": str(sent)},
        )


class EngineCalls:
    """See Engines. `token` is shown to the engines."""

    def __init__(self, token: str) -> None:
        self._metadata = tuple(auth.bearer(token)) if token else ()

    def answers(self, address: str) -> bool:
        with grpc.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            try:
                said = health.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_S)
            except grpc.RpcError:
                return False
            return bool(said.status == health_pb2.HealthCheckResponse.SERVING)

    def load(self, address: str, endpoint: str, adapter: Adapter) -> None:
        told = pb.ServedAdapter(alias=adapter["alias"], model=adapter["name"], digest=adapter["digest"])
        self._call(address, "LoadAdapter", pb.LoadAdapterRequest(endpoint=endpoint, adapter=told))

    def unload(self, address: str, endpoint: str, alias: str) -> None:
        self._call(address, "UnloadAdapter", pb.UnloadAdapterRequest(endpoint=endpoint, alias=alias))

    def _call(self, address: str, method: str, request: Any) -> None:
        with grpc.insecure_channel(address) as channel:
            try:
                getattr(InferenceStub(channel), method)(request, timeout=LOAD_S, metadata=self._metadata)
            except grpc.RpcError as error:
                raise from_rpc_error(error) from error


def _workspace(request: Any) -> str:
    return "/".join(request.endpoint.split("/")[:2])


def _has_details(error: grpc.aio.AioRpcError) -> bool:
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())


def _endpoint(record: Record) -> pb.Endpoint:
    body, spec = record.body, record.body["spec"]
    return pb.Endpoint(
        name=record.name,
        display_name=spec["display_name"],
        model=spec["model"],
        adapters=[pb.ServedAdapter(alias=a["alias"], model=a["name"], digest=a["digest"]) for a in spec["adapters"]],
        engine=spec["engine"],
        dtype=spec["dtype"],
        bits=spec["bits"],
        labels=spec["labels"],
        state=pb.Endpoint.State.Value(record.state),
        error=wire.error_status(body.get("error")),
        address=body.get("address", ""),
        template=spec["template"],
        create_time=wire.timestamp(record.create_time),
        etag=record.etag,
    )


def _served(record: Record) -> list[pb.ServedModel]:
    body = record.body
    spec, length = body["spec"], body["context_length"]
    bare = {"alias": "", "name": spec["model"], "digest": spec["digest"]}
    return [
        pb.ServedModel(
            endpoint=record.name,
            adapter=s["alias"],
            model=s["name"],
            digest=s["digest"],
            context_length=length,
            create_time=wire.timestamp(record.create_time),
        )
        for s in (bare, *body["applied"])
    ]
