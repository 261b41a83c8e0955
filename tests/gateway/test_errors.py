"""What goes wrong, as the unmodified openai SDK tells it: each its own class."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from services.inference.engines import servicer as engine_servicer
from services.inference.turns import Turns
from tests.gateway.web import gateway
from tests.inference.conftest import until
from tests.inference.endless import Endless
from tests.inference.engines.serving import engine_server

KEY = "a-key-that-is-long-enough"
HI: ChatCompletionUserMessageParam = {"role": "user", "content": "hi"}


def sdk(port: int, key: str = KEY, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, **{"max_retries": 0, **more})


@pytest.fixture()
def limits() -> Turns:
    return Turns(1, 1, 1)


@pytest.fixture()
def engine() -> Endless:
    return Endless(1)


@pytest.fixture()
def port(engine: Endless, limits: Turns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(engine_servicer, "Turns", lambda *numbers: limits)
    with engine_server(tmp_path, "", engine), gateway(f"unix:{tmp_path}/s", KEY) as made:
        yield made


def test_each_error_has_its_class(port: int) -> None:
    with sdk(port) as client, sdk(port, "wrong") as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.chat.completions.create(model="e", messages=[HI])
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="e:nobody", messages=[HI], stream=True)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as wrong:
            client.chat.completions.create(model="e", messages=[HI], temperature=-1)
        assert wrong.value.code == "sampling_invalid"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="e", prompt="x" * (1 << 20) + "x")
        assert long.value.code == "context_length_exceeded"


def test_a_full_queue_is_a_rate_limit_and_trying_again_helps(port: int, engine: Endless, limits: Turns) -> None:
    def say() -> Any:
        return client.chat.completions.create(model="e", messages=[HI], max_tokens=1 << 19, stream=True)

    with sdk(port) as client:
        first = say()
        next(iter(first))
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=1).chat.completions.create(model="e", messages=[HI])
        until(lambda: limits.waiting == 0, 60)  # who gave up waits no more
        with sdk(port) as other:
            waits = other.with_options(timeout=600).chat.completions
            thread = threading.Thread(
                target=lambda: waits.create(model="e", messages=[HI], max_tokens=3, stream=False), daemon=True
            )
            thread.start()
            until(lambda: limits.waiting == 1, 60)
            with pytest.raises(openai.RateLimitError) as full:
                client.chat.completions.create(model="e", messages=[HI])
            assert int(full.value.response.headers["retry-after"]) >= 1 and full.value.code == "queue_full"
            first.close()
            thread.join(60)
            assert not thread.is_alive()
        # The SDK itself waits as long as it is told to.
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.create(model="e", messages=[HI], max_tokens=3).choices[0].message.content
    until(lambda: engine.going == 0, 60)


def test_a_stream_that_is_left_frees_the_engine(port: int, engine: Endless) -> None:
    with sdk(port) as client:
        for _ in range(3):
            with client.chat.completions.create(model="e", messages=[HI], max_tokens=1 << 19, stream=True) as stream:
                assert next(iter(stream)).choices
        until(lambda: engine.going == 0, 60)
        assert engine.begun == 3


def test_services_that_are_away_and_gateways_that_are(tmp_path: Path) -> None:
    with gateway(f"unix:{tmp_path}/nobody") as port, sdk(port) as client:
        with pytest.raises(openai.InternalServerError) as away:
            client.chat.completions.create(model="e", messages=[HI])
        assert away.value.status_code == 503
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with sdk(unused.getsockname()[1]) as client, pytest.raises(openai.APIConnectionError):
            client.models.list()
