"""OpenAI's wire, read strictly: what would change the answer and is not done is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    Unavailable,
    Violation,
)
from services.gateway.errors import error_object, status_of
from services.gateway.wire import Answer, Choice, model_object, read_chat, read_completion

HI = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "e", "messages": [HI]}


def test_a_chat_becomes_one_request_an_answer() -> None:
    turns = [{"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": " brief"}]}, HI]
    body = {
        "model": "e:v2",
        "messages": turns,
        "n": 2,
        "seed": 7,
        "max_completion_tokens": 5,
        "stop": "END",
        "top_k": 3,
    }
    first, second = read_chat(body).requests("workspaces/w")
    assert isinstance(first, pb.ChatRequest) and isinstance(second, pb.ChatRequest)
    assert (first.endpoint, first.adapter) == ("workspaces/w/endpoints/e", "v2")
    assert [m.role for m in first.messages] == [pb.Message.SYSTEM, pb.Message.USER]
    assert "".join(p.text for p in first.messages[0].content) == "be brief"
    assert (first.sampling.max_tokens, first.sampling.top_k, list(first.sampling.stop)) == (5, 3, ["END"])
    assert (first.sampling.seed, second.sampling.seed) == (7, 8)
    assert not first.sampling.HasField("temperature")


def test_seeds_have_64_bits() -> None:
    def seeds(seed: int) -> list[int]:
        return [r.sampling.seed for r in read_chat({**CHAT, "seed": seed, "n": 2}).requests("workspaces/w")]

    assert seeds(2**32) == [2**32, 2**32 + 1] and seeds(-(2**63)) == [-(2**63), 1 - 2**63]
    assert seeds(2**63 - 1) == [2**63 - 1, -(2**63)]


def test_prompts_have_answers_one_after_another() -> None:
    body = {"model": "e", "prompt": ["a", [5, 6]], "n": 2, "seed": 1}
    found = read_completion(body).requests("workspaces/w")
    assert [getattr(r, "text", "") or list(r.token_ids.ids) for r in found] == ["a", "a", [5, 6], [5, 6]]  # type: ignore[union-attr]
    assert [r.sampling.seed for r in found] == [1, 2, 1, 2]
    for wrong, param in ((["a", 5], "prompt[1]"), ({}, "prompt"), (["a"] * 129, "prompt"), ([5, -1], "prompt")):
        with pytest.raises(InvalidArgument) as caught:
            read_completion({"model": "e", "prompt": wrong})
        assert error_object(caught.value)["error"]["param"] == param


@pytest.mark.parametrize("prompt", ["once", ["once"], [5, 6], [[5, 6]]])
def test_a_completion_takes_a_text_or_ids(prompt: Any) -> None:
    (request,) = read_completion({"model": "e", "prompt": prompt}).requests("workspaces/w")
    assert isinstance(request, pb.GenerateRequest)
    assert request.text == "once" or list(request.token_ids.ids) == [5, 6]


@pytest.mark.parametrize(
    ("change", "param", "reason"),
    [
        ({"temprature": 1}, "temprature", "FIELD_UNKNOWN"),
        ({"messages": [HI, {**HI, "tool_call": []}]}, "messages[1].tool_call", "FIELD_UNKNOWN"),
        ({"temperature": "hot"}, "temperature", "FIELD_INVALID"),
        ({"max_tokens": 1.5}, "max_tokens", "FIELD_INVALID"),
        ({"seed": 2**63}, "seed", "FIELD_INVALID"),
        ({"max_tokens": float("inf")}, "max_tokens", "FIELD_INVALID"),
        ({"temperature": float("inf")}, "temperature", "FIELD_INVALID"),
        ({"temperature": 10**400}, "temperature", "FIELD_INVALID"),
        ({"n": 0}, "n", "FIELD_INVALID"),
        ({"stop": [""]}, "stop", "FIELD_INVALID"),
        ({"model": ""}, "model", "FIELD_INVALID"),
        ({"messages": []}, "messages", "FIELD_INVALID"),
        ({"messages": [{"role": "oracle", "content": "x"}]}, "messages[0].role", "FIELD_INVALID"),
        ({"messages": [HI, {"role": "assistant"}]}, "messages[1].content", "FIELD_INVALID"),
        ({"messages": [{**HI, "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]", "FIELD_UNSUPPORTED"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "FIELD_INVALID"),
        ({"response_format": {"type": "yaml"}}, "response_format", "FIELD_INVALID"),
        ({"logprobs": 3}, "logprobs", "FIELD_INVALID"),
        ({"top_logprobs": 3}, "top_logprobs", "FIELD_INVALID"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "FIELD_INVALID"),
        ({"presence_penalty": "0.5"}, "presence_penalty", "FIELD_INVALID"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "FIELD_INVALID"),
        ({"logit_bias": [1]}, "logit_bias", "FIELD_INVALID"),
        ({"logit_bias": {"1": True}}, "logit_bias", "FIELD_INVALID"),
        ({"logit_bias": {"1": 10**400}}, "logit_bias", "FIELD_INVALID"),
        ({"service_tier": "flex"}, "service_tier", "FIELD_UNSUPPORTED"),
        ({"store": True}, "store", "FIELD_UNSUPPORTED"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_chat({**CHAT, **change})
    assert caught.value.reason == reason
    assert error_object(caught.value)["error"]["param"] == param


def test_values_that_ask_for_nothing_are_taken() -> None:
    neutral = {"logit_bias": {}, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "seed": None}
    notes = {"user": "u", "safety_identifier": "u", "prompt_cache_key": "k", "service_tier": "auto", "store": False}
    assert read_chat({**CHAT, **neutral, **notes}).sampling == {}
    turns = [{**HI, "name": "Ann"}, {"role": "assistant", "content": "ho", "audio": None, "refusal": None}, HI]
    assert len(read_chat({**CHAT, "messages": turns}).messages) == 3


def test_forms_and_logprobs_are_passed_on() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    named = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    (request,) = read_chat({**CHAT, "response_format": named, "logprobs": True, "top_logprobs": 2}).requests("w")
    assert request.sampling.json_schema == json.dumps(schema)
    assert request.sampling.logprobs == 2
    (request,) = read_chat({**CHAT, "response_format": {"type": "json_object"}, "logprobs": True}).requests("w")
    assert json.loads(request.sampling.json_schema) == {"type": "object"}
    assert request.sampling.HasField("logprobs") and request.sampling.logprobs == 0
    (request,) = read_completion({"model": "e", "prompt": "x", "logprobs": 0}).requests("w")
    assert request.sampling.HasField("logprobs")


def test_logprobs_have_openais_shapes() -> None:
    a, b = pb.Candidate(text="é", logprob=-0.5), pb.Candidate(text="\ufffd", logprob=-1.5)
    told = [pb.TokenLogprobs(chosen=a, top=[a, b]), pb.TokenLogprobs(chosen=b, top=[a])]
    chat = Answer(read_chat(CHAT), chat=True).whole([Choice("é", "stop", 2, told)], 1)["choices"][0]["logprobs"]
    assert [c["bytes"] for c in chat["content"]] == [[0xC3, 0xA9], None]
    assert [len(c["top_logprobs"]) for c in chat["content"]] == [2, 1]
    asked = read_completion({"model": "e", "prompt": "x"})
    bare = Answer(asked, chat=False).whole([Choice("é", "stop", 2, told)], 1)["choices"][0]["logprobs"]
    assert bare["tokens"] == ["é", "\ufffd"] and bare["text_offset"] == [0, 1]
    assert bare["top_logprobs"][1] == {"é": -0.5, "\ufffd": -1.5}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *CHAT,
                "prompt",
                "n",
                "stop",
                "stream",
                "stream_options",
                "top_p",
                "seed",
                "max_tokens",
                "temperature",
                "logit_bias",
                "logprobs",
                "response_format",
                "tools",
                "tool_choice",
                "parallel_tool_calls",
            ]
        ),
        JSON,
    )
)
def test_any_body_is_read_or_refused(body: dict[str, Any]) -> None:
    for read in (read_chat, read_completion):
        try:
            read(body).requests("workspaces/w")
        except InvalidArgument as error:
            assert error.violations
        except NotFound as error:
            assert error.reason == "ENDPOINT_NOT_FOUND"  # a model that no endpoint can be called


def test_errors_speak_as_openai_does() -> None:
    missing = error_object(NotFound("no", reason="ENDPOINT_NOT_FOUND"))["error"]
    assert (missing["code"], missing["type"]) == ("model_not_found", "not_found_error")
    wrong = error_object(Unauthenticated("no", reason="TOKEN_WRONG"))["error"]
    assert (wrong["code"], wrong["type"]) == ("invalid_api_key", "authentication_error")
    assert error_object(Unavailable("no", reason="ENGINE_LOST"))["error"]["type"] == "server_error"
    why = "must be at least 1"
    blamed = [Violation("sampling.max_tokens", why, "SAMPLING_INVALID")]
    sampling = InvalidArgument(f"sampling.max_tokens {why}", reason="SAMPLING_INVALID", violations=blamed)
    told = error_object(sampling)["error"]
    assert (told["param"], told["message"]) == ("max_tokens", f"max_tokens {why}")


def test_only_what_may_change_is_asked_again() -> None:
    """OpenAI's clients ask again after 409 and above 499."""
    able = {
        reason: status_of(FailedPrecondition("", reason=reason)) for reason in ("ENDPOINT_NOT_READY", "PARITY_MISMATCH")
    }
    assert able == {"ENDPOINT_NOT_READY": 503, "PARITY_MISMATCH": 400}


@pytest.mark.parametrize("model", ["HuggingFaceTB/SmolLM2", "A B", "4o", "x" * 64, "é"])
def test_what_no_endpoint_can_be_called_is_a_model_that_is_not_there(model: str) -> None:
    with pytest.raises(NotFound) as missing:
        read_chat({**CHAT, "model": model})
    assert error_object(missing.value)["error"]["code"] == "model_not_found"


def test_models_and_streams_have_openais_shapes() -> None:
    served = pb.ServedModel(endpoint="workspaces/w/endpoints/e", adapter="v2", model="workspaces/w/models/m")
    served.create_time.seconds = 1764000000
    assert model_object(served) == {
        "id": "e:v2",
        "object": "model",
        "created": 1764000000,
        "owned_by": "w",
        "root": "workspaces/w/models/m",
    }
    answer = Answer(read_chat(CHAT), chat=True)
    first, last = answer.chunk(0, "a", None, first=True), answer.chunk(0, None, "stop")
    assert first["id"] == last["id"] and first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "a"}
    assert last["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": None}
    counted = Answer(read_chat({**CHAT, "stream": True, "stream_options": {"include_usage": True}}), chat=True)
    assert counted.chunk(0, "a", None)["usage"] is None and counted.counts(1, 2)["usage"]["total_tokens"] == 3
    assert "usage" not in first
