"""Answers without a thread each: the asynchronous half of the client, for programs that hold many streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
from quartet.inference.v1 import inference_pb2
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.client.client import OPTIONS, Client
from services.common.status import STATUS_METADATA, from_rpc_error


class LiveInference:
    """Chat, Generate and ListServedModels on one event loop; failures are classes of services.finetune.errors."""

    def __init__(self, client: Client) -> None:
        """Calls go where the client's would, with its token and TLS. Make it while an event loop runs."""
        address, secure = client.address("inference"), client.credentials
        self._channel = (
            grpc.aio.secure_channel(address, secure, OPTIONS) if secure else grpc.aio.insecure_channel(address, OPTIONS)
        )
        self._stub = InferenceStub(self._channel)
        self._metadata = (*client.metadata, *STATUS_METADATA)
        self.parent = client.parent

    async def close(self) -> None:
        await self._channel.close()

    async def served(self) -> list[inference_pb2.ServedModel]:
        """What answers now."""
        request = inference_pb2.ListServedModelsRequest(parent=self.parent)
        try:
            return list((await self._stub.ListServedModels(request, metadata=self._metadata)).models)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def embed(self, request: inference_pb2.EmbedRequest) -> inference_pb2.EmbedResponse:
        """Vectors of texts."""
        try:
            answer: inference_pb2.EmbedResponse = await self._stub.Embed(request, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        return answer

    async def chat(self, request: inference_pb2.ChatRequest) -> AsyncIterator[inference_pb2.ChatResponse]:
        """Stream an answer; closing the iterator ends it at the engine too."""
        async for piece in self._stream(self._stub.Chat(request, metadata=self._metadata)):
            yield piece

    async def generate(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """As `chat`, of a bare prompt."""
        async for piece in self._stream(self._stub.Generate(request, metadata=self._metadata)):
            yield piece

    @staticmethod
    async def _stream(call: Any) -> AsyncIterator[Any]:
        try:
            async for piece in call:
                yield piece
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()
