"""Streams without a thread each: the asynchronous half of the client, for programs that hold many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
from quartet.inference.v1 import inference_pb2
from quartet.inference.v1.inference_pb2_grpc import InferenceStub
from quartet.training.v1 import training_pb2
from quartet.training.v1.training_pb2_grpc import TrainingStub

from services.client.client import OPTIONS, Client
from services.client.retry import RETRIES, pause_s
from services.common.status import STATUS_METADATA, from_rpc_error
from services.finetune.errors import Unavailable


class Live:
    """A channel to one service on one event loop; failures are classes of services.finetune.errors."""

    def __init__(self, client: Client, room: str) -> None:
        """Calls go where the client's would, with its token and TLS. Make it while an event loop runs."""
        address, secure = client.address(room), client.credentials
        self._channel = (
            grpc.aio.secure_channel(address, secure, OPTIONS) if secure else grpc.aio.insecure_channel(address, OPTIONS)
        )
        self._metadata = (*client.metadata, *STATUS_METADATA)
        self.parent = client.parent

    async def close(self) -> None:
        await self._channel.close()

    @staticmethod
    async def _stream(call: Any) -> AsyncIterator[Any]:
        try:
            async for piece in call:
                yield piece
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()


class LiveInference(Live):
    """Chat, Generate, Embed and ListServedModels."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, "inference")
        self._stub = InferenceStub(self._channel)

    async def served(self) -> list[inference_pb2.ServedModel]:
        """What answers now."""
        request = inference_pb2.ListServedModelsRequest(parent=self.parent)
        try:
            return list((await self._stub.ListServedModels(request, metadata=self._metadata)).models)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def chat(
        self, request: inference_pb2.ChatRequest, told: Sequence[tuple[str, str]] = ()
    ) -> AsyncIterator[inference_pb2.ChatResponse]:
        """Stream an answer; closing the iterator ends it at the engine too. `told` is further metadata of the call."""
        async for piece in self._stream(self._stub.Chat(request, metadata=(*self._metadata, *told))):
            yield piece

    async def embed(
        self, request: inference_pb2.EmbedRequest, told: Sequence[tuple[str, str]] = ()
    ) -> inference_pb2.EmbedResponse:
        """Vectors of texts."""
        try:
            answer: inference_pb2.EmbedResponse = await self._stub.Embed(request, metadata=(*self._metadata, *told))
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return answer

    async def generate(
        self, request: inference_pb2.GenerateRequest, told: Sequence[tuple[str, str]] = ()
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """As `chat`, of a bare prompt."""
        async for piece in self._stream(self._stub.Generate(request, metadata=(*self._metadata, *told))):
            yield piece


class LiveTraining(Live):
    """A training job's events."""

    def __init__(self, client: Client) -> None:
        super().__init__(client, "training")
        self._stub = TrainingStub(self._channel)

    async def watch(self, name: str) -> AsyncIterator[training_pb2.TrainingEvent]:
        """All events of a job by its full name, to its end; a cut stream goes on where it was."""
        after = tries = 0
        while True:
            request = training_pb2.WatchTrainingJobRequest(name=name, after_sequence=after)
            try:
                async for event in self._stream(self._stub.WatchTrainingJob(request, metadata=self._metadata)):
                    after, tries = event.sequence, 0
                    yield event
                return
            except Unavailable:
                if tries == RETRIES:
                    raise
                await asyncio.sleep(pause_s(tries))
                tries += 1
