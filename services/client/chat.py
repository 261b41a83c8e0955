"""`quartet chat`: the seed's loop. A message ends with an empty line; RESET forgets the talk, EXIT leaves."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quartet.inference.v1 import inference_pb2

from services.client.client import Client
from services.client.commands import connect
from services.client.seeing import read_image, seeing_model
from services.client.show import out, tell
from services.finetune.errors import InvalidArgument, NotFound, QuartetError, nearest

DTYPES = {"auto": "", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""As `xtuner chat` calls them."""


def chat(a: Namespace) -> None:
    with connect(a) as client, endpoint_for(client, a) as (endpoint, adapter):
        system = _system(a)
        history: list[tuple[str, str]] = [("system", system)] if system else []
        if a.message:
            answer, _ = _turn(client, endpoint, adapter, [*history, ("user", a.message)], [], a)
            if a.json:
                out({"answer": answer})
            return
        said: list[list[int]] = []  # the answers' tokens: their texts alone might become others
        for text in typed():
            if text == "RESET":
                said = []
                history = history[:1] if system else []
                if not a.json:
                    print("forgotten")
                continue
            asked = [*history, ("user", text)]
            try:
                answer, ids = _turn(client, endpoint, adapter, asked, said, a)
            except InvalidArgument as error:
                # A text too long, say: a person may try another, a script should hear of it.
                if not sys.stdin.isatty():
                    raise
                tell(error, as_json=False)
                continue
            if a.json:
                out({"answer": answer})
            history = [*asked, ("assistant", answer)]
            said.append(ids)


def _check_served(endpoint: inference_pb2.Endpoint, a: Namespace) -> None:
    """InvalidArgument (TASK_INVALID) if it serves in another form than is asked for."""
    dtype = DTYPES[a.torch_dtype]
    for flag, wanted, own in (("--bits", a.bits, endpoint.bits), ("--torch-dtype", dtype, endpoint.dtype)):
        if wanted and wanted != own:
            told = own or "the model's own precision"
            raise InvalidArgument(
                f"{flag} is not how {endpoint.name} serves, which is {told}: leave it out, or name a model",
                reason="TASK_INVALID",
            )


def sampling(a: Namespace) -> dict[str, Any]:
    """What a command's flags say of sampling, less the stop words."""
    wanted = {
        "temperature": a.temperature,
        "top_p": a.top_p,
        "top_k": a.top_k,
        "repetition_penalty": a.repetition_penalty,
        "max_tokens": a.max_new_tokens,
        "seed": a.seed,
    }
    return {k: v for k, v in wanted.items() if v is not None}


def _turn(
    client: Client, endpoint: str, adapter: str, messages: list[tuple[str, str]], said: list[list[int]], a: Namespace
) -> tuple[str, list[int]]:
    """An answer and its tokens."""
    answer, ids = "", list[int]()
    images = [read_image(path) for path in a.image]
    more = {"images": images, "said": said, "stop": a.stop_words, **sampling(a)}
    for piece in client.chat(endpoint, messages, adapter, a.prompt_template, **more):
        answer += piece.text
        ids += piece.token_ids
        if not (a.json or a.no_streamer):
            print(piece.text, end="", flush=True)
    if not a.json:
        print(answer if a.no_streamer else "")
    return answer, ids


def _system(a: Namespace) -> str:
    """The system text. NotFound (SYSTEM_NOT_FOUND)."""
    if not a.system_template:
        return str(a.system)
    from services.finetune.recipes.tables import filled, systems

    known = systems()
    if a.system_template not in known:
        raise NotFound(
            f"there is no system text {a.system_template!r}{nearest(a.system_template, sorted(known))}",
            reason="SYSTEM_NOT_FOUND",
        )
    return filled(known[a.system_template], a.bot_name)


def typed() -> Iterator[str]:
    """What is typed, up to an empty line each; a pipe's last message may end with the pipe."""
    tty = sys.stdin.isatty()
    lines: list[str] = []
    if tty:
        print("A message ends with an empty line. RESET forgets the talk, EXIT leaves.")
        print("> ", end="", flush=True)
    for line in sys.stdin:
        text = line.rstrip("\n")
        if text == "EXIT" and not lines:
            return
        if text:
            lines.append(text)
            if text != "RESET" or len(lines) > 1:
                continue
        if lines:
            yield "\n".join(lines)
            lines = []
        if tty:
            print("> ", end="", flush=True)
    if lines:
        yield "\n".join(lines)


@contextmanager
def endpoint_for(client: Client, a: Namespace) -> Iterator[tuple[str, str]]:
    """(endpoint, alias): an endpoint that exists, or one for the time of this talk."""
    name = client.name("endpoints", a.model)
    if "/models/" not in a.model and not (a.llava or a.visual_encoder):
        try:
            client.inference.GetEndpoint(inference_pb2.GetEndpointRequest(name=name))
        except QuartetError as error:
            if error.reason != "ENDPOINT_NOT_FOUND":
                raise
        else:
            _check_served(client.wait_ready(name), a)
            yield name, a.adapter
            return
    model, adapter = seeing_model(client, a) if a.llava or a.visual_encoder else (a.model, a.adapter)
    adapters = {"adapter": adapter} if adapter else {}
    endpoint = client.serve(model, adapters, bits=a.bits, dtype=DTYPES[a.torch_dtype])
    try:
        yield endpoint.name, "adapter" if adapter else ""
    finally:
        client.inference.DeleteEndpoint(inference_pb2.DeleteEndpointRequest(name=endpoint.name))
