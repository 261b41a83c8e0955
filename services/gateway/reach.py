"""The services as the gateway reaches them: from threads by the client, from its event loop by streams."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from quartet.inference.v1 import inference_pb2

from services.client.client import Client
from services.client.live import LiveInference, LiveTraining
from services.common import requests
from services.common.metrics import Answers


class Reach:
    """`inference` and `training` are there while it is `open`."""

    inference: LiveInference
    training: LiveTraining

    def __init__(self, client: Client) -> None:
        self.client = client
        self.answers = Answers()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Within the event loop that the streams will live in."""
        self.inference, self.training = LiveInference(self.client), LiveTraining(self.client)
        try:
            yield
        finally:
            await self.inference.close()
            await self.training.close()

    def chat(self, request: inference_pb2.ChatRequest, number: str = "") -> AsyncIterator[Any]:
        """An answer as it comes, counted; `number` is the id of the request that it is for."""
        return self.answers.counted(self.inference.chat(request, requests.along(number)))

    def generate(self, request: inference_pb2.GenerateRequest, number: str = "") -> AsyncIterator[Any]:
        """As `chat`, of a bare prompt."""
        return self.answers.counted(self.inference.generate(request, requests.along(number)))
