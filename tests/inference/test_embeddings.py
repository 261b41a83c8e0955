"""An encoder from its folder to the openai SDK: imported, served by the engine server, asked through the gateway."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
import torch
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.finetune.convert.importing import import_model
from services.finetune.errors import FailedPrecondition, InvalidArgument, QuartetError
from services.finetune.orders import ImportTask
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import open_store
from services.finetune.store.artifacts import load
from services.inference.engines.__main__ import build
from tests.common.serving import refused, serve
from tests.gateway.web import gateway
from tests.inference.encoders import tiny_encoder
from tests.inference.engines.serving import engine_server
from tests.inference.wire import turns

TEXTS = ["the cat sat", "the market fell, the market fell.", "cat"]


def brought_in(folder: Path, home: Path) -> tuple[Any, str]:
    """(store, digest) of the folder, imported as a worker does it."""
    store = open_store((home / "store").as_uri())
    raise_fence(store, "jobs/import", 1)
    home.joinpath("work").mkdir()
    with Attempt(store, "jobs/import", 1) as attempt:
        return store, import_model(ImportTask(local_path=str(folder)), attempt, threading.Event(), home / "work")


def reference(folder: Path, mode: str, normalize: bool) -> torch.Tensor:
    """Each text alone, by transformers: no padding can disturb it."""
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        with torch.no_grad():
            states_LD = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = {"mean": states_LD.mean(0), "cls": states_LD[0], "max": states_LD.amax(0)}[mode]
        found.append(vector / vector.norm() if normalize else vector)
    return torch.stack(found)


@pytest.fixture(scope="module", params=[("mean", True), ("cls", False), ("max", True)], ids=lambda p: p[0])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, torch.Tensor]]:
    """(the server's home, what it should say)."""
    import asyncio

    home = tmp_path_factory.mktemp("h")
    folder = tiny_encoder(home / "encoder", *request.param)
    store, digest = brought_in(folder, home)
    meta = load(store, digest).meta
    assert (meta["pooling"], meta["normalize"], meta["context_length"]) == (*request.param, 24)
    order = {
        "endpoint": "workspaces/default/endpoints/e",
        "model": {"name": "workspaces/default/models/m", "digest": digest},
        "adapters": [],
        "engine": "transformers",
        "dtype": "float32",
        "bits": 0,
    }
    home.joinpath("engine").mkdir()
    room, _ = asyncio.run(build(store, order, home / "engine"))
    with serve(room, home):
        yield home, reference(folder, *request.param)


@pytest.fixture()
def stub(served: tuple[Path, torch.Tensor]) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(f"unix:{served[0]}/s") as channel:
        yield InferenceStub(channel)


def asked(*texts: str) -> pb.EmbedRequest:
    return pb.EmbedRequest(inputs=[pb.EmbedInput(text=t) for t in texts])


def test_vectors_are_what_transformers_computes(served: tuple[Path, torch.Tensor], stub: InferenceStub) -> None:
    answer = stub.Embed(asked(*TEXTS))
    vectors = torch.tensor([list(e.values) for e in answer.embeddings])
    torch.testing.assert_close(vectors, served[1], atol=1e-5, rtol=1e-4)
    assert answer.usage.prompt_tokens == 5 + 10 + 3
    ids = pb.EmbedInput(token_ids=pb.TokenIds(ids=[2, 5, 6, 7, 3]))
    again = stub.Embed(pb.EmbedRequest(inputs=[ids])).embeddings[0].values
    torch.testing.assert_close(torch.tensor(list(again)), served[1][0], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_embedded_is_blamed(stub: InferenceStub) -> None:
    with refused(InvalidArgument, "PROMPT_TOO_LONG") as error:
        stub.Embed(asked("cat", "cat " * 30))
    assert error[0].violations[0].field == "inputs[1]"
    with refused(InvalidArgument, "PROMPT_EMPTY"):
        stub.Embed(asked(""))
    with refused(InvalidArgument, "PROMPT_EMPTY"):
        stub.Embed(pb.EmbedRequest(inputs=[pb.EmbedInput(token_ids=pb.TokenIds(ids=[10_000]))]))
    for count in (0, 257):
        with refused(InvalidArgument, "TEXTS_TOO_MANY"):
            stub.Embed(asked(*["cat"] * count))
    with refused(FailedPrecondition, "TEMPLATE_MISSING"):
        list(stub.Chat(pb.ChatRequest(messages=turns("hi"))))
    with refused(FailedPrecondition, "GENERATION_UNSUPPORTED"):
        list(stub.Generate(pb.GenerateRequest(text="the")))


def test_by_the_openai_sdk(served: tuple[Path, torch.Tensor]) -> None:
    with (
        gateway(f"unix:{served[0]}/s") as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
    ):
        for form in ({}, {"encoding_format": "float"}):  # left out, the SDK asks for base64
            made = client.embeddings.create(model="e", input=TEXTS, **form)  # type: ignore[arg-type]
            vectors = torch.tensor([d.embedding for d in made.data])
            torch.testing.assert_close(vectors, served[1], atol=1e-5, rtol=1e-4)
        assert made.usage.total_tokens == 18
        many = client.embeddings.create(model="e", input=["cat"] * 300)
        assert [d.index for d in many.data] == list(range(300)) and many.data[0].embedding == many.data[299].embedding
        bad: list[dict[str, Any]] = [{"input": []}, {"input": [""]}, {"input": "cat", "dimensions": 8}]
        for wrong in bad:
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model="e", **wrong)


def test_models_that_answer_do_not_embed(tmp_path: Path) -> None:
    with engine_server(tmp_path, "") as channel, refused(FailedPrecondition, "EMBEDDINGS_UNSUPPORTED"):
        InferenceStub(channel).Embed(asked("cat"))


def modules(folder: Path, *kinds: str) -> None:
    listed = [{"path": "1_Pooling", "type": f"x.{k}"} for k in kinds]
    (folder / "modules.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: modules(f, "Transformer", "Pooling", "Dense"),
        lambda f: modules(f, "Transformer"),
        lambda f: (f / "modules.json").write_text("{"),
        lambda f: (f / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}'),
        lambda f: (f / "1_Pooling" / "config.json").unlink(),
        lambda f: (f / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Model"]}'),
    ],
)
def test_encoders_that_are_not_known_are_refused(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    folder = tiny_encoder(tmp_path / "encoder")
    spoil(folder)
    with pytest.raises(QuartetError) as caught:
        brought_in(folder, tmp_path)
    assert caught.value.reason in ("MODEL_UNSUPPORTED", "CONFIG_MALFORMED")
