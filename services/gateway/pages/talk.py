"""A conversation on a page: its settings, and an answer as it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.utils import get_upload_folder
from quartet.inference.v1 import inference_pb2 as pb

from services.finetune.errors import FailedPrecondition, InvalidArgument, QuartetError
from services.gateway.pages.words import in_lines
from services.gateway.reach import Reach

OWN = "model's own"
SETTINGS: tuple[tuple[str, str, str, type], ...] = (
    ("temperature", "Temperature", OWN, float),
    ("top_p", "Top p", OWN, float),
    ("top_k", "Top k", OWN, int),
    ("repetition_penalty", "Repetition penalty", OWN, float),
    ("max_tokens", "Most new tokens", "512", int),
    ("seed", "Seed", "any", int),
)
"""Fields of Sampling: name, label, what it is when empty, kind."""
FAILED = "No answer"
"""The title of a turn that tells an error."""
Turn = dict[str, Any]
"""As Gradio holds it: {"role": …, "content": a text or a list of parts, "metadata": {"title": …} or none}."""


def settings() -> list[Component]:
    """The system text, and the fields of `sampling`."""
    with gr.Group():
        system = gr.Textbox(label="System", placeholder=OWN, lines=2)
        numbers = []
        for pair in (SETTINGS[:2], SETTINGS[2:4], SETTINGS[4:]):
            with gr.Row():
                # Texts: Gradio's field for numbers cannot be empty, and 0 would ask for something.
                numbers += [gr.Textbox(label=told, placeholder=empty, min_width=110) for _, told, empty, _ in pair]
    return [system, *numbers]


def sampling(*values: str | None) -> pb.Sampling:
    """What the fields ask for; empty ones ask for nothing. InvalidArgument (SAMPLING_INVALID) for what is no number."""
    given: dict[str, Any] = {}
    for (name, told, _, kind), value in zip(SETTINGS, values, strict=True):
        try:
            if value and value.strip():
                given[name] = kind(value)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise InvalidArgument(f"{told} must be {what}, or empty", reason="SAMPLING_INVALID") from None
    try:
        return pb.Sampling(**given)
    except ValueError as error:
        raise InvalidArgument(f"a setting is too large: {error}", reason="SAMPLING_INVALID") from None


async def answer(
    reach: Reach, model: str | None, turns: Sequence[Turn], system: str | None, *values: str | None
) -> AsyncIterator[list[Turn]]:
    """The answer so far, as it grows: a turn, and another one if it ends with an error, which `asked` leaves out when
    the talk goes on. `values` are those of `settings` after the system text."""
    text = ""
    try:
        request = asked(reach.inference.parent, model, turns, system, sampling(*values))
        async with aclosing(reach.chat(request)) as pieces:  # type: ignore[type-var]  # it is a generator
            async for piece in pieces:
                if piece.text:
                    text += piece.text
                    yield [{"role": "assistant", "content": text}]
    except QuartetError as error:
        begun = [{"role": "assistant", "content": text}] if text else []
        yield [*begun, {"role": "assistant", "content": in_lines(error), "metadata": {"title": FAILED}}]
        return
    if not text:
        yield [{"role": "assistant", "content": "(an empty answer)"}]


def asked(
    parent: str, model: str | None, turns: Sequence[Turn], system: str | None, how: pb.Sampling
) -> pb.ChatRequest:
    """The request for the answer to the last turn. FailedPrecondition (ENDPOINT_NOT_READY) without a model."""
    if not model:
        raise FailedPrecondition("nothing is served yet: quartet endpoint create MODEL", reason="ENDPOINT_NOT_READY")
    said: list[Turn] = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        if (turn.get("metadata") or {}).get("title") == FAILED:
            while said and said[-1]["role"] != "user":
                said.pop()  # what came of the answer before it failed
            said = said[:-1]
        else:
            said.append(turn)
    endpoint, _, adapter = model.partition(":")
    return pb.ChatRequest(
        endpoint=f"{parent}/endpoints/{endpoint}",
        adapter=adapter,
        messages=[pb.Message(role=turn["role"].upper(), content=parts(turn["content"])) for turn in said],
        sampling=how,
    )


def turn(message: Mapping[str, Any]) -> Turn:
    """A user's turn, of what MultimodalTextbox gives: images first, as the model is used to."""
    files = [{"type": "file", "file": {"path": path}} for path in message["files"]]
    text = [{"type": "text", "text": message["text"]}] if message["text"] else []
    return {"role": "user", "content": [*files, *text]}


def parts(content: Any) -> list[pb.Part]:
    """A turn's content for the services. InvalidArgument (IMAGE_INVALID) for a file that is not there any more."""
    if isinstance(content, str):
        return [pb.Part(text=content)]
    found = []
    for part in content:
        # Of a talk's own state Gradio gives texts and {"path": …}, of what is shown {"type": …}.
        if isinstance(part, str):
            found.append(pb.Part(text=part))
        elif part.get("type") == "text":
            found.append(pb.Part(text=part["text"]))
        elif path := part.get("path") or part.get("file", {}).get("path"):
            found.append(pb.Part(image=pb.Image(data=_uploaded(path))))
    return found


def _uploaded(path: str) -> bytes:
    """A file that a browser sent; the talk comes from there too, so it may name any."""
    real = Path(path).resolve()
    if not real.is_relative_to(Path(get_upload_folder()).resolve()) or not real.is_file():
        raise InvalidArgument("the image is not there any more; upload it again", reason="IMAGE_INVALID")
    return real.read_bytes()
