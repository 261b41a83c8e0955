"""What an engine server makes of requests: prompts by the artifact's template, sampling by its defaults, stop texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from quartet.inference.v1 import inference_pb2 as pb
from quartet.inference.v1.inference_pb2_grpc import InferenceStub

from services.finetune.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from services.finetune.formats import Message
from services.finetune.formats.rows import openai
from services.finetune.templates import load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from services.inference.engines.stopping import StopText
from tests.common.serving import refused
from tests.inference.conftest import READY, Models, Service
from tests.inference.wire import ASSISTANT, GREEDY, SYSTEM, endpoint, turns, whole
from tests.tiny import tiny_tokenizer

STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_files(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def engine(service: Service, models: Models) -> Iterator[InferenceStub]:
    """Straight to an engine server: what it says itself."""
    name = endpoint(service.stub, "answers", adapters=[("brief", "one"), ("untold", "untold")]).name
    address = service.wait_for(name, READY).address
    with grpc.insecure_channel(address) as channel:
        yield InferenceStub(channel)
    service.stub.DeleteEndpoint(pb.DeleteEndpointRequest(name=name))


def generate(engine: InferenceStub, text: str = "hi", **sampling: object) -> tuple[str, list[int], pb.GenerateResponse]:
    wanted = pb.Sampling(**{"temperature": 0, "max_tokens": 40, **sampling})  # type: ignore[arg-type]
    return whole(engine.Generate(pb.GenerateRequest(text=text, sampling=wanted)))


def tokens(engine: InferenceStub, *said: object, adapter: str = "") -> list[int]:
    wanted = pb.Conversation(messages=turns(*said))  # type: ignore[arg-type]
    return list(engine.Tokenize(pb.TokenizeRequest(adapter=adapter, conversation=wanted)).token_ids)


def test_a_chat_is_tokenised_as_in_training(engine: InferenceStub, tokenizer: Tokenizer) -> None:
    template = load_template("tokenizer", tokenizer)
    said = [Message("user", "hi"), Message("assistant", "yes"), Message("user", "<|im_end|>so?")]
    wanted = [(pb.Message.USER, "hi"), (ASSISTANT, "yes"), "<|im_end|>so?"]
    assert tokens(engine, *wanted) == to_prompt_ids(template, tokenizer, said)
    # The adapter was trained with a system text: it is said unless the caller says another.
    assert tokens(engine, *wanted, adapter="brief") == to_prompt_ids(template, tokenizer, said, "Be brief.")
    other = to_prompt_ids(template, tokenizer, [Message("system", "Sing."), *said])
    assert tokens(engine, (SYSTEM, "Sing."), *wanted, adapter="brief") == other
    assert tokenizer.decode(other, skip_special=False).startswith("<|im_start|>system\nSing.<|im_end|>")


def test_questions_in_a_row_are_one_as_in_training(engine: InferenceStub, tokenizer: Tokenizer) -> None:
    asked: list[str | tuple[pb.Message.Role.ValueType, str]] = [
        (SYSTEM, "a"),
        (SYSTEM, "b"),
        "c",
        "",
        "d",
        (ASSISTANT, "e"),
        "f",
        "g",
    ]
    said = [*turns(*asked), *turns((ASSISTANT, "h"))]
    row = [{"role": pb.Message.Role.Name(m.role).lower(), "content": m.content[0].text} for m in said]
    learned = openai({"messages": row}).messages
    assert [m.content for m in learned] == ["a\nb", "c\nd", "e", "f\ng", "h"]
    assert tokens(engine, *asked) == to_prompt_ids(load_template("tokenizer", tokenizer), tokenizer, learned[:-1])


def test_a_chat_is_a_generation_of_its_tokens(engine: InferenceStub) -> None:
    for adapter in ("", "brief"):
        ids = pb.TokenIds(ids=tokens(engine, "hi", adapter=adapter))
        chatted = whole(engine.Chat(pb.ChatRequest(adapter=adapter, messages=turns("hi"), sampling=GREEDY)))
        fed = whole(engine.Generate(pb.GenerateRequest(adapter=adapter, token_ids=ids, sampling=GREEDY)))
        assert chatted[:2] == fed[:2]
        assert chatted[2].usage.prompt_tokens == len(ids.ids)


def test_an_answer_ends_by_length_and_by_context(engine: InferenceStub) -> None:
    _, ids, last = generate(engine, max_tokens=5)
    assert (len(ids), last.finish_reason, last.usage.completion_tokens) == (5, LENGTH, 5)
    _, ids, last = generate(engine, "x" * 500, max_tokens=400)
    assert (len(ids), last.finish_reason) == (12, LENGTH)


def test_a_stop_text_ends_the_answer_and_is_never_sent(engine: InferenceStub) -> None:
    text, ids, _ = generate(engine)
    stop = next(text[n : n + 3] for n in range(6, len(text)) if "\ufffd" not in text[n : n + 3])
    cut, some, last = generate(engine, stop=["never said", stop])
    assert (cut, last.finish_reason) == (text[: text.index(stop)], STOP)
    assert some == ids[: len(some)]
    assert len(some) < len(ids)


def test_a_stop_that_is_a_special_token_ends_by_its_id(engine: InferenceStub) -> None:
    # Random weights rarely say it: a strong penalty on everything else does.
    ids = pb.TokenIds(ids=range(3, 259))
    wanted = pb.Sampling(temperature=0, max_tokens=200, repetition_penalty=10, stop=["<|endoftext|>", "<|im_start|>"])
    _, said, last = whole(engine.Generate(pb.GenerateRequest(token_ids=ids, sampling=wanted)))
    assert not {0, 1} & set(said)
    assert last.finish_reason == STOP


def test_stop_texts_are_held_back_until_it_is_clear(tokenizer: Tokenizer) -> None:
    def said(text: str, *stops: str) -> tuple[list[str], bool]:
        watch, out = StopText(tokenizer, stops), []
        for n, token in enumerate(ids := tokenizer.encode(text)):
            out.append(watch.push([token], n == len(ids) - 1))
            if watch.stopped:
                break
        return out, watch.stopped

    assert said("ab END cd", "END") == (["a", "b", " ", "", "", ""], True)
    assert said("ab ENg", "END") == (["a", "b", " ", "", "", "ENg"], False)
    assert said("xEE", "EEE") == (["x", "", "EE"], False)
    assert said("EEEND", "END") == (["", "E", "E", "", ""], True)
    assert "".join(said("grüße", "ß")[0]) == "grü"


def test_a_seed_decides(engine: InferenceStub) -> None:
    warm = [generate(engine, temperature=1, seed=seed)[0] for seed in (3, 3, 4)]
    assert warm[0] == warm[1] != warm[2]


def test_wrong_requests_are_blamed(engine: InferenceStub) -> None:
    with refused(NotFound, "ADAPTER_NOT_FOUND") as error:
        list(engine.Generate(pb.GenerateRequest(adapter="x", text="hi")))
    assert "brief" in error[0].message
    for request in (pb.GenerateRequest(), pb.GenerateRequest(token_ids=pb.TokenIds(ids=[259]))):
        with refused(InvalidArgument, "PROMPT_EMPTY"):
            list(engine.Generate(request))
    with refused(InvalidArgument, "PROMPT_TOO_LONG") as error:
        generate(engine, "x" * 512)
    assert error[0].metadata == {"prompt_tokens": "512", "context_length": "512"}
    with refused(InvalidArgument, "SAMPLING_INVALID") as error:
        generate(engine, temperature=-1, top_p=0, top_k=-1, max_tokens=0, repetition_penalty=0)
    blamed = ["temperature", "top_p", "top_k", "max_tokens", "repetition_penalty"]
    assert [v.field for v in error[0].violations] == [f"sampling.{name}" for name in blamed]
    with refused(InvalidArgument, "SAMPLING_INVALID") as error:
        generate(engine, frequency_penalty=3, presence_penalty=-3, min_p=2, logit_bias={259: 1})
    blamed = ["frequency_penalty", "presence_penalty", "min_p", "logit_bias"]
    assert [v.field for v in error[0].violations] == [f"sampling.{name}" for name in blamed]
    for wrong in (
        {"json_schema": "{"},
        {"json_schema": '{"type": "no such type"}'},
        {"regex": "("},
        {"grammar": "a: b"},
    ):
        with refused(InvalidArgument, "FORM_INVALID") as error:
            generate(engine, **wrong)
        assert [v.field for v in error[0].violations] == [f"sampling.{next(iter(wrong))}"]
    with refused(InvalidArgument, "FORM_INVALID"):
        generate(engine, regex="a" * 70_000)
    with refused(InvalidArgument, "MESSAGES_EMPTY"):
        tokens(engine)
    with refused(FailedPrecondition, "TEMPLATE_MISMATCH"):
        list(engine.Chat(pb.ChatRequest(messages=turns("hi"), template="chatml")))
    assert list(engine.Chat(pb.ChatRequest(messages=turns("hi"), template="tokenizer", sampling=GREEDY)))


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ([(ASSISTANT, "a")], "messages[0].role"),
        ([(SYSTEM, "a")], "messages[1].role"),
        (["a", (SYSTEM, "b")], "messages[1].role"),
        (["a", (ASSISTANT, "b")], "messages[1].role"),
        ([(pb.Message.ROLE_UNSPECIFIED, "a")], "messages[0].role"),
    ],
)
def test_roles_come_in_order(engine: InferenceStub, said: list[object], field: str) -> None:
    with refused(InvalidArgument, "ROLE_ORDER") as error:
        tokens(engine, *said)
    assert error[0].violations[0].field == field


def test_two_streams_share_the_engine(engine: InferenceStub) -> None:
    slow = pb.GenerateRequest(text="hi", sampling=pb.Sampling(temperature=0, max_tokens=450))
    long = engine.Generate(slow)
    next(long)
    assert len(generate(engine, max_tokens=4)[1]) == 4
    rest = list(long)
    assert len(rest) > 1, "the long answer was over before the short one"
    assert rest[-1].usage.completion_tokens == 450
    # Coalesced: far fewer messages than tokens.
    assert len(rest) < 300


def test_endpoints_are_not_the_engines_business(engine: InferenceStub) -> None:
    with refused(Unimplemented, "UNIMPLEMENTED"):
        engine.CreateEndpoint(pb.CreateEndpointRequest())
    with refused(Unimplemented, "UNIMPLEMENTED"):
        engine.ListEndpoints(pb.ListEndpointsRequest())
    served = engine.ListServedModels(pb.ListServedModelsRequest()).models
    assert [(m.adapter, m.context_length) for m in served] == [("", 512), ("brief", 512), ("untold", 512)]


def test_what_has_no_template_generates_but_does_not_chat(engine: InferenceStub) -> None:
    with refused(FailedPrecondition, "TEMPLATE_MISSING"):
        list(engine.Chat(pb.ChatRequest(adapter="untold", messages=turns("hi"))))
    assert whole(engine.Generate(pb.GenerateRequest(adapter="untold", text="hi", sampling=GREEDY)))[1]


def test_the_logs_are_quiet(service: Service, engine: InferenceStub) -> None:
    log = next(p for p in (service.home / "logs").iterdir() if ".answers." in p.name)
    assert all("quartet.engine" in line for line in Path(log).read_text().splitlines()), log.read_text()
