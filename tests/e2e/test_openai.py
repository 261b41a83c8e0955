"""The unmodified openai SDK against the gateway, in front of a real model."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from tests.e2e.stack import Stack

KEY = "a-key-that-is-long-enough"
FRANCE: ChatCompletionUserMessageParam = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture(scope="module")
def base_url(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway with a key; the services behind it have none, so the key is the gateway's alone."""
    made = stack.quartet("endpoint", "create", "smollm2", "--name", "paris", "--json")
    assert made.returncode == 0, made.stderr
    with stack.gateway(tmp_path_factory.mktemp("gateway"), KEY) as address:
        yield address + "/v1"
    assert stack.quartet("endpoint", "delete", "paris").returncode == 0


@pytest.fixture()
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key=KEY, max_retries=0) as made:
        yield made


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["paris"]
    assert client.models.retrieve("paris").id == "paris"


def test_chat_whole_and_streamed_say_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="paris", messages=[FRANCE], temperature=0, max_tokens=24)
    text = whole.choices[0].message.content
    assert text is not None and "Paris" in text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None and whole.usage.total_tokens > whole.usage.completion_tokens > 0
    said, finish, counted = "", None, None
    for chunk in client.chat.completions.create(
        model="paris",
        messages=[FRANCE],
        temperature=0,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    ):
        counted = chunk.usage or counted
        for choice in chunk.choices:
            said += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert (said, finish, counted) == (text, "stop", whole.usage)


def test_many_choices_and_stops(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model="paris", messages=[FRANCE], n=3, seed=1, temperature=1.0, max_tokens=12)
    assert [c.index for c in made.choices] == [0, 1, 2]
    cut = client.chat.completions.create(model="paris", messages=[FRANCE], temperature=0, max_tokens=24, stop=["Paris"])
    assert cut.choices[0].message.content is not None and "Paris" not in cut.choices[0].message.content


def test_an_answer_has_the_schema_that_is_asked_for(client: openai.OpenAI) -> None:
    class City(pydantic.BaseModel):
        name: str
        country: Literal["France", "Spain"]

    made = client.chat.completions.parse(
        model="paris", messages=[FRANCE], response_format=City, temperature=0, max_tokens=64
    )
    city = made.choices[0].message.parsed
    assert city is not None and city.country in ("France", "Spain")


def test_tokens_tell_how_likely_they_were(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="paris", messages=[FRANCE], temperature=0, max_tokens=4, logprobs=True, top_logprobs=2
    )
    told = made.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 4
    assert "".join(t.token for t in told.content) == made.choices[0].message.content
    assert all(t.logprob == t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob for t in told.content)
    bare = client.completions.create(model="paris", prompt="1, 2, 3, 4,", temperature=0, max_tokens=4, logprobs=1)
    assert bare.choices[0].logprobs is not None and len(bare.choices[0].logprobs.tokens or ()) == 4


def test_a_bare_prompt_is_continued(client: openai.OpenAI) -> None:
    made = client.completions.create(model="paris", prompt="1, 2, 3, 4,", temperature=0, max_tokens=4)
    assert "5" in made.choices[0].text and made.choices[0].finish_reason == "length"


def test_many_prompts_are_continued_in_their_order(client: openai.OpenAI) -> None:
    prompts = ["1, 2, 3, 4,", "The capital of France is"]
    whole = client.completions.create(model="paris", prompt=prompts, temperature=0, max_tokens=4)
    assert [c.index for c in whole.choices] == [0, 1]
    assert "5" in whole.choices[0].text and "Paris" in whole.choices[1].text
    alone = [client.completions.create(model="paris", prompt=p, temperature=0, max_tokens=4).usage for p in prompts]
    assert whole.usage is not None
    assert whole.usage.total_tokens == sum(u.total_tokens for u in alone if u is not None)
    *pieces, last = client.completions.create(
        model="paris", prompt=prompts, temperature=0, max_tokens=4, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage == whole.usage
    said = ["".join(c.text for p in pieces for c in p.choices if c.index == n) for n in range(2)]
    assert said == [c.text for c in whole.choices]


def test_errors_are_the_sdks_own_classes(client: openai.OpenAI, base_url: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nobody", messages=[FRANCE])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="paris:nobody", messages=[FRANCE], stream=True)
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="paris", prompt="word " * 9000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="paris", messages=[FRANCE], frequency_penalty=0.5)
    assert wrong.value.param == "frequency_penalty"
    with pytest.raises(openai.BadRequestError, match="serve an encoder"):
        client.embeddings.create(model="paris", input="Paris")
    stranger = openai.OpenAI(base_url=base_url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "\\ud800"}', 400),
        (b'{"model": "\xed\xa0\x80"}', 400),
        (b" " * (5 << 20), 413),
    ],
)
def test_bodies_that_are_no_requests(base_url: str, data: bytes, status: int) -> None:
    request = urllib.request.Request(
        f"{base_url}/chat/completions", data, {"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as error:
        assert error.code == status and error.headers["x-request-id"] == "mine"
        assert json.loads(error.read())["error"]["message"]


def test_an_open_door_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.client", "gateway", "--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 65 and "--token-file" in done.stderr and "Traceback" not in done.stderr
