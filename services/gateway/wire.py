"""OpenAI's wire to our messages and back. What a field would change and we do not do is refused, never ignored.

Source of the shapes: OpenAI's API reference, "Chat completions", "Completions", "Models".
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import nearest
from services.gateway.errors import bad, read_model
from services.gateway.images import image_part
from services.gateway.tools import call_objects, read_calls, read_tools

ROLES = {"system": "SYSTEM", "developer": "SYSTEM", "user": "USER", "assistant": "ASSISTANT", "tool": "TOOL"}
FINISH = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
MOST_CHOICES = 16
MOST_ANSWERS = 128
"""To all prompts of one request."""

SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "min_p": float,
    "max_tokens": int,
    "max_completion_tokens": int,
    "seed": int,
}
MOST = 1e30
"""Numbers end here: JSON has greater ones, which no float of ours can hold."""
WHOLE_BELOW = {"seed": 2**63}
"""Whole numbers end at 2³¹ otherwise."""
COMMON = {"model", "stream", "stream_options", "n", "stop", "logprobs", "logit_bias", *SAMPLING}
NOTES = {"user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention"}
"""Fields that change no answer."""
MESSAGE = {"role", "content", "tool_calls", "tool_call_id", "function_call"}
MESSAGE_NOTES = {"name", "refusal", "annotations", "reasoning", "reasoning_content"}
"""What a history may hold and no template has a place for: who speaks, and what servers tell beside an answer."""
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "functions": ([],),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}
"""Fields that are taken at values which ask for nothing."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, read. `model` is an endpoint, or endpoint:alias for one of its adapters; `n` answers are wanted to a chat,
    or to each of the prompts, one after another."""

    model: str
    n: int
    stream: bool
    usage: bool
    """Whether a stream ends with the counts."""
    sampling: Mapping[str, Any]
    stop: Sequence[str]
    messages: Sequence[pb.Message] = field(default_factory=list)
    tools: Mapping[str, Any] = field(default_factory=dict)
    """The fields of a ChatRequest that tell of tools."""
    prompts: Sequence[str | list[int]] = ("",)

    def requests(self, parent: str) -> list[pb.ChatRequest | pb.GenerateRequest]:
        """One request to the engine for each answer; with a seed, each has its own."""
        endpoint, _, adapter = self.model.partition(":")
        to: dict[str, Any] = {"endpoint": f"{parent}/endpoints/{endpoint}", "adapter": adapter}
        return [self._request(to, prompt, n) for prompt in self.prompts for n in range(self.n)]

    def _request(self, to: Mapping[str, Any], prompt: str | list[int], n: int) -> pb.ChatRequest | pb.GenerateRequest:
        given = dict(self.sampling)
        if "seed" in given:
            given["seed"] = (given["seed"] + n + 2**63) % 2**64 - 2**63
        sampling = pb.Sampling(**given, stop=self.stop)
        if self.messages:
            return pb.ChatRequest(**to, messages=self.messages, sampling=sampling, **self.tools)
        if isinstance(prompt, str):
            return pb.GenerateRequest(**to, text=prompt, sampling=sampling)
        return pb.GenerateRequest(**to, token_ids=pb.TokenIds(ids=prompt), sampling=sampling)


# ---------------------------------------------------------------------------------------------- requests


def read_chat(body: Any, fetched: Mapping[str, bytes] = MappingProxyType({})) -> Asked:
    """A body of /v1/chat/completions; `fetched` are images by their addresses.

    InvalidArgument (FIELD_UNKNOWN, FIELD_INVALID, FIELD_UNSUPPORTED).
    """
    body = _checked(
        body, {"messages", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls"}
    )
    turns = body.get("messages")
    if not isinstance(turns, list) or not turns:
        raise bad("messages", "must be a list of at least one message")
    messages = [_message(f"messages[{n}]", turn, fetched) for n, turn in enumerate(turns)]
    return _asked(body, messages=messages, tools=read_tools(body))


def read_completion(body: Any) -> Asked:
    """A body of /v1/completions; a prompt is a text or a list of token ids. Errors as read_chat."""
    body = _checked(body, {"prompt"})
    given = body.get("prompt")
    prompts = given if isinstance(given, list) and given and isinstance(given[0], str | list) else [given]
    for n, prompt in enumerate(prompts):
        ids = isinstance(prompt, list) and all(type(i) is int and 0 <= i < 2**31 for i in prompt)
        if not isinstance(prompt, str) and not ids:
            where = f"prompt[{n}]" if len(prompts) > 1 else "prompt"
            raise bad(where, "must be a text, or a list of token ids; several prompts are a list of these")
    asked = _asked(body, prompts=prompts)
    if len(prompts) * asked.n > MOST_ANSWERS:
        raise bad("prompt", f"asks for {len(prompts) * asked.n} answers, and may for {MOST_ANSWERS}; send it in parts")
    return asked


def _checked(body: Any, own: set[str]) -> dict[str, Any]:
    """The fields that are set, once all are known and none asks for what we do not do."""
    if not isinstance(body, dict):
        raise bad("", "the body must be a JSON object")
    given: dict[str, Any] = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in COMMON | NOTES | own | set(NEUTRAL):
            why = f"is no field of this request{nearest(name, sorted(COMMON | own))}"
            raise bad(name, why, "FIELD_UNKNOWN")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            raise bad(name, "is not supported here; leave it out", "FIELD_UNSUPPORTED")
    return given


def _asked(body: Mapping[str, Any], **own: Any) -> Asked:
    model, n, options = read_model(body.get("model")), body.get("n", 1), body.get("stream_options", {})
    if type(n) is not int or not 1 <= n <= MOST_CHOICES:
        raise bad("n", f"must be a whole number from 1 to {MOST_CHOICES}")
    if not isinstance(body.get("stream", False), bool):
        raise bad("stream", "must be true or false")
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise bad("stream_options", "may hold include_usage")
    return Asked(
        model=model,
        n=n,
        stream=body.get("stream", False),
        usage=bool(options.get("include_usage")),
        sampling={
            **_sampling(body),
            **_bias(body.get("logit_bias", {})),
            **_logprobs(body, "messages" in own),
            **_form(body.get("response_format")),
        },
        stop=_stop(body.get("stop", [])),
        **own,
    )


def _sampling(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in SAMPLING.items():
        if name in body:
            value = body[name]
            most = WHOLE_BELOW.get(name, 2**31) if kind is int else MOST
            if not _is_number(value, most) or (kind is int and value != int(value)):
                why = f"must be a whole number, {most - 1} at most" if kind is int else "must be a number"
                raise bad(name, why)
            found["max_tokens" if name == "max_completion_tokens" else name] = kind(value)
    return found


def _is_number(value: Any, most: float = MOST) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -most <= value < most


def _bias(given: Any) -> dict[str, dict[int, float]]:
    """By tokens, which JSON can only write as texts."""
    good = isinstance(given, dict) and all(
        key.isdecimal() and len(key) < 10 and _is_number(value) for key, value in given.items()
    )
    if not good:
        raise bad("logit_bias", 'must be an object of token ids and numbers, as {"42": -100}')
    return {"logit_bias": {int(key): float(value) for key, value in given.items()}} if given else {}


def _logprobs(body: Mapping[str, Any], chat: bool) -> dict[str, int]:
    """A chat asks by `logprobs` true and their number beside it, a completion by the number alone."""
    asked, count = (body.get("logprobs", False), body.get("top_logprobs", 0)) if chat else (True, body.get("logprobs"))
    if not isinstance(asked, bool):
        raise bad("logprobs", "must be true or false")
    if count is None or not (asked or count):
        return {}
    name = "top_logprobs" if chat else "logprobs"
    if not asked:
        raise bad("top_logprobs", "goes with logprobs true")
    if type(count) is not int or not 0 <= count <= 20:
        raise bad(name, "must be a whole number from 0 to 20")
    return {"logprobs": count}


def _form(given: Any) -> dict[str, str]:
    """The schema of response_format; its keys' order is kept."""
    if given is None or given == {"type": "text"}:
        return {}
    kind = given.get("type") if isinstance(given, dict) else None
    if kind == "json_object":
        return {"json_schema": json.dumps({"type": "object"})}
    wrapped = given.get("json_schema") if kind == "json_schema" else None
    if not isinstance(wrapped, dict) or not isinstance(wrapped.get("schema"), dict):
        raise bad("response_format", "must be of type text, json_object, or json_schema with json_schema.schema")
    return {"json_schema": json.dumps(wrapped["schema"], ensure_ascii=False)}


def _stop(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(t, str) and t for t in texts):
        raise bad("stop", "must be a text or a list of texts")
    return texts


def _message(where: str, turn: Any, fetched: Mapping[str, bytes]) -> pb.Message:
    if not isinstance(turn, dict):
        raise bad(where, "must be an object with role and content")
    unknown = {name for name, value in turn.items() if value is not None} - MESSAGE - MESSAGE_NOTES
    if unknown:
        name = min(unknown)
        raise bad(f"{where}.{name}", f"is no field of a message{nearest(name, sorted(MESSAGE))}", "FIELD_UNKNOWN")
    role = turn.get("role")
    if role not in ROLES:
        raise bad(f"{where}.role", f"must be one of {', '.join(ROLES)}")
    if turn.get("function_call"):
        raise bad(f"{where}.function_call", "is not supported here; use tool_calls", "FIELD_UNSUPPORTED")
    calls = read_calls(f"{where}.tool_calls", turn.get("tool_calls") or [])
    answers = turn.get("tool_call_id") or ""
    if not isinstance(answers, str):
        raise bad(f"{where}.tool_call_id", "must be a text")
    content = turn.get("content")
    if content is None and calls:
        content = ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise bad(f"{where}.content", "must be a text, or a list of parts")
    return pb.Message(
        role=ROLES[role],  # type: ignore[arg-type]  # a role's name will do
        content=[_part(f"{where}.content[{n}]", p, fetched) for n, p in enumerate(parts)],
        tool_calls=calls,
        tool_call_id=answers,
    )


def _part(where: str, part: Any, fetched: Mapping[str, bytes]) -> pb.Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image_url":
        return image_part(where, part, fetched)
    if kind != "text":
        why = "must be a part of type text or image_url; other kinds are not supported here"
        raise bad(where, why, "FIELD_UNSUPPORTED")
    if not isinstance(part.get("text"), str):
        raise bad(f"{where}.text", "must be a text")
    return pb.Part(text=part["text"])


# ---------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer."""

    text: str
    finish: str
    tokens: int
    logprobs: Sequence[pb.TokenLogprobs] = ()
    calls: Sequence[pb.ToolCall] = ()


class Answer:
    """The objects of one answer: `chunk` for a stream, `whole` at once. `chat` tells the two kinds of request apart."""

    def __init__(self, asked: Asked, chat: bool) -> None:
        self._chat, self._counted = chat, asked.usage
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": asked.model,
        }

    def chunk(
        self,
        index: int,
        text: str | None,
        finish: str | None,
        first: bool = False,
        logprobs: Sequence[pb.TokenLogprobs] = (),
        calls: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        """A piece of choice `index`; `text` None only ends it."""
        choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": self._likely(logprobs)}
        if self._chat:
            role = {"role": "assistant"} if first else {}
            told = {"tool_calls": calls} if calls else {}
            choice["delta"] = {**role, **({"content": text} if text is not None else {}), **told}
        else:
            choice["text"] = text or ""
        # Where counts are asked for, all chunks but the last have none by name.
        return {**self._object([choice], ".chunk"), **({"usage": None} if self._counted else {})}

    def counts(self, prompt: int, completion: int) -> dict[str, Any]:
        """The last object of a stream that was asked for its counts."""
        return {**self._object([], ".chunk"), "usage": usage(prompt, completion)}

    def whole(self, made: Sequence[Choice], prompt: int) -> dict[str, Any]:
        """All choices."""
        choices: list[dict[str, Any]] = []
        for index, one in enumerate(made):
            said: dict[str, Any] = {"text": one.text}
            if self._chat:
                calls = {"tool_calls": call_objects(one.calls)} if one.calls else {}
                content = None if one.calls and not one.text else one.text
                said = {"message": {"role": "assistant", "content": content, "refusal": None, **calls}}
            choices.append(
                {"index": index, **said, "finish_reason": one.finish, "logprobs": self._likely(one.logprobs)}
            )
        return {**self._object(choices), "usage": usage(prompt, sum(one.tokens for one in made))}

    def _likely(self, given: Sequence[pb.TokenLogprobs]) -> dict[str, Any] | None:
        if not given:
            return None
        if self._chat:
            content = [{**_candidate(g.chosen), "top_logprobs": [_candidate(c) for c in g.top]} for g in given]
            return {"content": content, "refusal": None}
        texts = [g.chosen.text for g in given]
        return {
            "tokens": texts,
            "token_logprobs": [g.chosen.logprob for g in given],
            "top_logprobs": [{c.text: c.logprob for c in (*g.top, g.chosen)} for g in given],
            "text_offset": [sum(map(len, texts[:n])) for n in range(len(texts))],
        }

    def _object(self, choices: list[dict[str, Any]], chunk: str = "") -> dict[str, Any]:
        kind = "chat.completion" + chunk if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices}


def _candidate(given: pb.Candidate) -> dict[str, Any]:
    # A part of a character has no bytes that could be told from its text.
    told = None if "\ufffd" in given.text else list(given.text.encode())
    return {"token": given.text, "logprob": given.logprob, "bytes": told}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def model_object(served: pb.ServedModel) -> dict[str, Any]:
    """An entry of /v1/models."""
    endpoint = served.endpoint.rpartition("/")[2]
    name = f"{endpoint}:{served.adapter}" if served.adapter else endpoint
    return {
        "id": name,
        "object": "model",
        "created": served.create_time.seconds,
        "owned_by": served.endpoint.split("/")[1],
        "root": served.model,
    }
