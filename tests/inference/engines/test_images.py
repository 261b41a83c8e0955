"""Chats with images over a real server and the transformers engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from PIL import Image
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub
from transformers import LlavaForConditionalGeneration

from services.finetune.errors import FailedPrecondition, InvalidArgument, NotFound
from services.finetune.store.artifacts import publish_directory, put_ref
from services.finetune.vision import pixels, read_form
from services.inference.engines.images import MAX_BYTES, MAX_IMAGES
from services.inference.engines.messages import read_turns
from services.inference.engines.port import Picture, Sampling, Step
from services.inference.engines.transformers import TransformersEngine
from services.inference.servable import check_hot
from tests.common.serving import refused
from tests.finetune.train.llava import tiny_llava
from tests.inference.engines.seeing import (
    NAME,
    Seeing,
    photo,
    says,
    seeing_server,
    shows,
    tiny_seeing,
    token_of,
    user,
)
from tests.inference.engines.serving import engine_server

GREEDY = Sampling(0, 1, 0, 12, 1, None, ())
TOKENS = 4


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    return tiny_seeing(tmp_path_factory.mktemp("seeing"))


@pytest.fixture(scope="module")
def engine(seeing: Seeing) -> TransformersEngine:
    return TransformersEngine(seeing.folder, seeing.adapters, "float32", 0)


@pytest.fixture(scope="module")
def room(
    seeing: Seeing, engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[InferenceStub]:
    with seeing_server(tmp_path_factory.mktemp("s"), seeing, engine) as channel:
        yield InferenceStub(channel)


def chat(room: InferenceStub, *messages: pb.Message, tokens: int = 12) -> tuple[list[int], pb.Usage]:
    sampling = pb.Sampling(temperature=0, max_tokens=tokens)
    answers = list(room.Chat(pb.ChatRequest(endpoint=NAME, messages=messages, sampling=sampling)))
    return [i for a in answers for i in a.token_ids], answers[-1].usage


def tokenized(room: InferenceStub, *messages: pb.Message) -> list[int]:
    conversation = pb.Conversation(messages=messages)
    return list(room.Tokenize(pb.TokenizeRequest(endpoint=NAME, conversation=conversation)).token_ids)


def expected(seeing: Seeing, adapter: str, ids: list[int], images: list[bytes], tokens: int) -> list[int]:
    """What stock transformers answers, with PEFT on the whole model."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(seeing.folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, seeing.adapters[adapter])
    form = read_form(seeing.folder)
    assert form is not None
    seen = torch.stack([torch.from_numpy(pixels(io.BytesIO(data), form)) for data in images])
    with torch.inference_mode():
        out = model.eval().generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values=seen,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return list(out[0, len(ids) :].tolist())


def test_answers_are_those_of_stock_transformers(seeing: Seeing, room: InferenceStub) -> None:
    image, other = photo(1), photo(2, 40, 70, "JPEG")
    talk = (user(shows(image), says("What is this?")), pb.Message(role=pb.Message.ASSISTANT, content=[says("Noise.")]),
            user(says("And this?"), shows(other)))  # fmt: skip
    ids = tokenized(room, *talk)
    token = token_of(seeing.folder)
    assert ids.count(token) == 2 * TOKENS and ids.index(token) < len(ids) - 20
    answer, usage = chat(room, *talk)
    assert answer == expected(seeing, "", ids, [image, other], len(answer)) and len(answer) == 12
    assert usage.prompt_tokens == len(ids)
    assert (
        chat(room, user(shows(other), says("What is this?")))[0]
        != chat(room, user(shows(image), says("What is this?")))[0]
    )


@pytest.mark.parametrize("adapter", ["whole", "language"])
def test_an_adapter_sees_with_its_own_tower_and_projector(
    seeing: Seeing, engine: TransformersEngine, adapter: str
) -> None:
    image = photo(3)
    ids = [1, 9, *[token_of(seeing.folder)] * TOKENS, 20, 21]
    picture = Picture("3" * 64, image)
    for _ in range(2):  # the second time features are known
        assert answered(engine, ids, picture, adapter) == expected(seeing, adapter, ids, [image], 12)
        assert answered(engine, ids, picture, "") == expected(seeing, "", ids, [image], 12)


def answered(engine: TransformersEngine, ids: list[int], picture: Picture, adapter: str) -> list[int]:
    async def ask() -> list[Step]:
        return [step async for step in engine.generate(ids, GREEDY, adapter, [picture])]

    return [i for step in asyncio.run(ask()) for i in step.ids]


def test_an_image_is_looked_at_once(seeing: Seeing, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TransformersEngine(seeing.folder, {}, "float32", 0)
    looks: list[int] = []
    look = engine._model.get_image_features

    def counted(**given: Any) -> Any:
        looks.append(1)
        return look(**given)

    monkeypatch.setattr(engine._model, "get_image_features", counted)
    ids = [1, *[token_of(seeing.folder)] * TOKENS, 7]
    first = answered(engine, ids, Picture("a", photo(4)), "")
    assert answered(engine, ids, Picture("a", photo(4)), "") == first and len(looks) == 1
    answered(engine, ids, Picture("b", photo(5)), "")
    assert len(looks) == 2


def test_a_long_prompt_is_read_in_parts(seeing: Seeing, engine: TransformersEngine, monkeypatch: Any) -> None:
    monkeypatch.setattr("services.inference.engines.transformers.PREFILL", 5)
    ids = [1, 9, 8, *[token_of(seeing.folder)] * TOKENS, *range(20, 40)]
    assert answered(engine, ids, Picture("5" * 64, photo(6)), "") == expected(seeing, "", ids, [photo(6)], 12)


def test_a_file_of_a_dataset_is_an_image(seeing: Seeing, room: InferenceStub, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(photo(1))
    digest = publish_directory(seeing.store, "dataset", tmp_path)
    for workspace in ("default", "other"):
        put_ref(seeing.store, f"workspaces/{workspace}/datasets/d/revisions/r", {"digest": digest})

    def of(revision: str, path: str) -> pb.Part:
        return pb.Part(image=pb.Image(file=pb.DatasetFile(revision=revision, path=path)))

    mine = "workspaces/default/datasets/d/revisions/r"
    asked = says("What?")
    assert chat(room, user(of(mine, "images/1.png"), asked)) == chat(room, user(shows(photo(1)), asked))
    with refused(NotFound, "FILE_NOT_FOUND"):
        chat(room, user(of(mine, "images/2.png"), asked))
    for elsewhere in (
        "workspaces/other/datasets/d/revisions/r",
        "",
        "workspaces/default/../other/datasets/d/revisions/r",
    ):
        with refused(NotFound, "REVISION_NOT_FOUND"):
            chat(room, user(of(elsewhere, "images/1.png"), asked))


def bomb() -> bytes:
    data = io.BytesIO()
    Image.new("1", (9000, 9000)).save(data, "PNG")
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "IMAGE_INVALID"),
        (photo(1)[:200], "IMAGE_INVALID"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "IMAGE_INVALID"),
        (b"%PDF-1.7", "IMAGE_INVALID"),
        (bomb(), "IMAGE_TOO_LARGE"),
        (photo(1, 2000, 2), "IMAGE_TOO_THIN"),
    ],
)
def test_bad_images_are_refused(room: InferenceStub, data: bytes, reason: str) -> None:
    with refused(InvalidArgument, reason) as error:
        chat(room, user(says("What?"), shows(data)))
    assert error[0].message.startswith("messages[0].content[1].image: ")


def test_limits_and_misplaced_images(
    seeing: Seeing, room: InferenceStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = shows(photo(1, 28, 28))
    with refused(InvalidArgument, "IMAGES_TOO_MANY"):
        chat(room, user(*[image] * (MAX_IMAGES + 1)))
    monkeypatch.setattr("services.inference.engines.images.MAX_BYTES", 100)
    with refused(InvalidArgument, "IMAGE_TOO_LARGE"):
        chat(room, user(image))
    monkeypatch.undo()
    assert MAX_BYTES == 20_000_000
    for talk in (
        [pb.Message(role=pb.Message.SYSTEM, content=[image]), user(says("hi"))],
        [user(image, says("What does <image> mean?"))],
    ):
        with refused(InvalidArgument, "IMAGE_MISPLACED"):
            chat(room, *talk)
    # Without an image it is a text as any.
    plain = tokenized(room, user(says("What does <image> mean?")))
    assert token_of(seeing.folder) not in plain
    with refused(InvalidArgument, "IMAGE_MISPLACED"):
        list(room.Generate(pb.GenerateRequest(endpoint=NAME, text="a <image> b")))
    with engine_server(tmp_path, "") as channel, refused(InvalidArgument, "IMAGES_UNSUPPORTED"):
        chat(InferenceStub(channel), user(image, says("hi")))


def test_an_image_stands_on_a_line_of_its_own() -> None:
    image = shows(b"x")
    parts = {
        "<image>\nWhat?": [image, says("What?")],
        "<image>\n What?": [image, says("\n What?")],
        "Look:\n<image>\n<image>\nAnd?": [says("Look:"), image, image, says("And?")],
        "See\n<image>": [says("See\n"), image],
        "<image>": [image, says("")],
    }
    for text, given in parts.items():
        assert read_turns([user(*given)], 1)[0].content == text
    # An image and the question about it may come apart.
    assert [t.content for t in read_turns([user(image), user(says("What?"))], 1)] == ["<image>\nWhat?"]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_language_model_alone_is_quantised(tmp_path: Path, bits: int) -> None:
    model = TransformersEngine(tiny_llava(tmp_path / "m", hidden=64), {}, "float32", bits)._model
    kinds = {n: type(m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    left = {n for n, kind in kinds.items() if kind is torch.nn.Linear}
    assert left == {n for n in kinds if not n.startswith("model.language_model.")} and left != set(kinds)


def test_vllm_is_not_given_what_it_would_ignore() -> None:
    config = {"peft_type": "LORA", "r": 4}
    check_hot(config, "vllm", "a", ["language_model"])
    check_hot(config, "transformers", "a", ["language_model", "projector", "vision_tower"])
    for part, word in (("vision_tower", "vision tower"), ("projector", "projector")):
        with pytest.raises(FailedPrecondition, match=word) as error:
            check_hot(config, "vllm", "a", ["language_model", part])
        assert error.value.metadata["verdict"] == "merge needed"
