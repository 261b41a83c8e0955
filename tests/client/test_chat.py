"""The talk: messages end with an empty line, history is kept, a model's endpoint lives as long as the talk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import empty_pb2
from grpc_status import rpc_status
from quartet.conversion.v1 import conversion_pb2, conversion_pb2_grpc
from quartet.inference.v1 import inference_pb2, inference_pb2_grpc

from services.client.parser import parser
from services.common.status import to_status
from services.finetune.errors import InvalidArgument, NotFound, QuartetError
from tests.client.conftest import Done, Quartet, serving

Turns = list[tuple[str, str]]


class Inference(inference_pb2_grpc.InferenceServicer):
    """Answers with the number of messages it was shown; remembers what it was asked to do."""

    def __init__(self) -> None:
        self.endpoints: dict[str, inference_pb2.Endpoint] = {}
        self.created: list[inference_pb2.Endpoint] = []
        self.asked: list[inference_pb2.ChatRequest] = []

    def turns(self) -> list[Turns]:
        role = inference_pb2.Message.Role.Name
        return [[(role(m.role), m.content[0].text) for m in r.messages] for r in self.asked]

    def GetEndpoint(self, request: Any, context: Any) -> Any:
        if request.name not in self.endpoints:
            _abort(context, NotFound(f"{request.name} is not there", reason="ENDPOINT_NOT_FOUND"))
        return self.endpoints[request.name]

    def CreateEndpoint(self, request: Any, context: Any) -> Any:
        made = inference_pb2.Endpoint()
        made.CopyFrom(request.endpoint)
        made.name = f"{request.parent}/endpoints/{request.endpoint_id or 'made'}"
        made.state = inference_pb2.Endpoint.READY
        self.endpoints[made.name] = made
        self.created.append(made)
        return made

    def DeleteEndpoint(self, request: Any, context: Any) -> Any:
        del self.endpoints[request.name]
        return empty_pb2.Empty()

    def Chat(self, request: Any, context: Any) -> Iterator[Any]:
        self.asked.append(request)
        if request.messages[-1].content[0].text == "too long":
            _abort(context, InvalidArgument("the prompt is too long", reason="PROMPT_TOO_LONG"))
        yield inference_pb2.ChatResponse(text="seen ", token_ids=[7, 8])
        yield inference_pb2.ChatResponse(text=str(len(request.messages)), token_ids=[len(request.messages)])


def _abort(context: Any, error: QuartetError) -> None:
    context.abort_with_status(rpc_status.to_status(to_status(error)))


@pytest.fixture()
def inference() -> Inference:
    # What it leaves out answers UNIMPLEMENTED, as gRPC has it.
    return Inference()  # type: ignore[abstract]


@pytest.fixture()
def address(inference: Inference) -> Iterator[str]:
    def add(server: grpc.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)

    with serving(add) as found:
        yield found


def say(quartet: Quartet, monkeypatch: pytest.MonkeyPatch, typed: str, *words: str) -> Done:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return quartet("chat", *words)


def test_history_is_kept_and_forgotten(
    quartet: Quartet, inference: Inference, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = "one\ntwo\n\nthree\n\nRESET\nfour\n\nEXIT\nfive\n\n"
    done = say(quartet, monkeypatch, typed, "m", "--system", "be short", "--endpoint", address)
    assert (done.status, done.out) == (0, "seen 2\nseen 4\nforgotten\nseen 2\n")
    system = ("SYSTEM", "be short")
    assert inference.turns() == [
        [system, ("USER", "one\ntwo")],
        [system, ("USER", "one\ntwo"), ("ASSISTANT", "seen 2"), ("USER", "three")],
        [system, ("USER", "four")],
    ]
    # An answer is told in the tokens in which it was given.
    said = [[list(m.token_ids) for m in request.messages] for request in inference.asked]
    assert said == [[[], []], [[], [], [7, 8, 2], []], [[], []]]


def test_json_is_a_line_an_answer(quartet: Quartet, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = say(quartet, monkeypatch, "a\n\nRESET\nb", "m", "--json", "--endpoint", address)
    assert [json.loads(line) for line in done.out.splitlines()] == [{"answer": "seen 1"}] * 2


def test_a_models_endpoint_goes_away_even_after_an_error(quartet: Quartet, inference: Inference, address: str) -> None:
    words = ["--adapter", "mine", "--bits", "4", "--endpoint", address]
    assert quartet("chat", "m", "-m", "hi", *words).status == 0
    done = quartet("chat", "m", "-m", "too long", *words)
    assert (done.status, done.err) == (65, "error: the prompt is too long\n")
    made = inference.created[0]
    assert (made.model, made.bits) == ("workspaces/default/models/m", 4)
    assert made.adapters[0].model == "workspaces/default/models/mine"
    assert inference.asked[0].adapter == made.adapters[0].alias
    assert len(inference.created) == 2 and not inference.endpoints


def test_an_image_is_shown_with_the_first_message(
    quartet: Quartet, inference: Inference, address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"PNG")
    words = ["--image", str(tmp_path / "a.png"), "--system", "s", "--endpoint", address]
    assert say(quartet, monkeypatch, "one\n\ntwo\n\n", "m", *words).status == 0
    for request in inference.asked:
        shown = [[p.image.data if p.HasField("image") else p.text for p in m.content] for m in request.messages]
        assert shown[:2] == [["s"], [b"PNG", "one"]] and all(len(parts) == 1 for parts in shown[2:])
    assert quartet("chat", "m", "-m", "hi", "--image", "none.png", "--endpoint", address).status == 66
    (tmp_path / "large.png").write_bytes(bytes(4_000_000))
    done = quartet("chat", "m", "-m", "hi", "--image", str(tmp_path / "large.png"), "--endpoint", address)
    assert done.status == 65 and "scale it down" in done.err


class Models(conversion_pb2_grpc.ConversionServicer):
    """Models by id: a language model, a tower, what they were assembled to, and what was tuned on that."""

    def __init__(self) -> None:
        parts = [_parent("language_model", "llm"), _parent("vision_tower", "vit")]
        self.models = {
            "llm": conversion_pb2.Model(digest="d-llm", kind=conversion_pb2.Model.BASE),
            "vit": conversion_pb2.Model(digest="d-vit", kind=conversion_pb2.Model.VISION_TOWER),
            "vit-2": conversion_pb2.Model(digest="d-vit-2", kind=conversion_pb2.Model.VISION_TOWER),
            "seen": conversion_pb2.Model(digest="d-seen", kind=conversion_pb2.Model.BASE, parents=parts),
            "tuned": conversion_pb2.Model(
                digest="d-tuned", kind=conversion_pb2.Model.ADAPTER, parents=[_parent("base", "seen")]
            ),
            "merged": conversion_pb2.Model(digest="d-merged", kind=conversion_pb2.Model.MERGED),
        }
        self.assembled: list[conversion_pb2.ConversionJob] = []

    def GetModel(self, request: Any, context: Any) -> Any:
        name = request.name.rpartition("/")[2]
        if name not in self.models:
            _abort(context, NotFound(f"there is no {name}", reason="MODEL_NOT_FOUND"))
        found = conversion_pb2.Model(name=request.name)
        found.MergeFrom(self.models[name])
        return found

    def CreateConversionJob(self, request: Any, context: Any) -> Any:
        self.assembled.append(request.conversion_job)
        parts = [_parent("language_model", "llm"), _parent("vision_tower", "vit")]
        self.models[request.conversion_job.target_model.rpartition("/")[2]] = conversion_pb2.Model(
            digest="d-new", kind=conversion_pb2.Model.BASE, parents=parts
        )
        return self._done(request.conversion_job.target_model)

    def GetConversionJob(self, request: Any, context: Any) -> Any:
        return self._done(self.assembled[-1].target_model)

    def WatchConversionJob(self, request: Any, context: Any) -> Iterator[Any]:
        yield from ()

    def _done(self, target: str) -> conversion_pb2.ConversionJob:
        state = conversion_pb2.ConversionJob.SUCCEEDED
        name = "workspaces/default/conversionJobs/j"
        return conversion_pb2.ConversionJob(name=name, target_model=target, state=state)


def _parent(role: str, name: str) -> conversion_pb2.Parent:
    return conversion_pb2.Parent(role=role, digest=f"d-{name}", name=f"workspaces/default/models/{name}")


def test_the_tutorials_flags_find_or_make_the_one_model(quartet: Quartet, inference: Inference) -> None:
    models = Models()  # type: ignore[abstract]  # as Inference

    def add(server: grpc.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
        conversion_pb2_grpc.add_ConversionServicer_to_server(models, server)

    def chat(*words: str) -> Done:
        return quartet("chat", "llm", "-m", "hi", *words, "--endpoint", address)

    with serving(add) as address:
        assert chat("--visual-encoder", "vit", "--llava", "tuned").status == 0
        assert chat("--llava", "merged").status == 0
        # The two alone: assembled at first, found again.
        assert chat("--visual-encoder", "vit").status == chat("--visual-encoder", "vit").status == 0
        wrong = chat("--visual-encoder", "vit-2", "--llava", "tuned")
    names = [(e.model.rpartition("/")[2], [a.model.rpartition("/")[2] for a in e.adapters]) for e in inference.created]
    assert names == [("seen", ["tuned"]), ("merged", []), ("llm-vit", []), ("llm-vit", [])]
    assert len(models.assembled) == 1 and models.assembled[0].assemble.vision_tower.endswith("/vit")
    assert wrong.status != 0 and "another vision tower than vit-2" in wrong.err


def test_an_endpoint_that_is_there_stays(quartet: Quartet, inference: Inference, address: str) -> None:
    assert quartet("endpoint", "create", "m", "--name", "e", "--endpoint", address).status == 0
    words = ["--temperature", "0", "--top-p", "0.5", "--top-k", "3", "--max-new-tokens", "9", "--seed", "7"]
    more = ["--stop-words", "x", "y", "--prompt-template", "t", "--repetition-penalty", "1.5"]
    done = quartet("chat", "e", "-m", "hi", *words, *more, "--endpoint", address, "--json")
    assert done.json == {"answer": "seen 1"} and list(inference.endpoints) == ["workspaces/default/endpoints/e"]
    asked = inference.asked[0]
    wanted = inference_pb2.Sampling(
        temperature=0, top_p=0.5, top_k=3, max_tokens=9, seed=7, stop=["x", "y"], repetition_penalty=1.5
    )
    assert (asked.endpoint, asked.template, asked.sampling) == ("workspaces/default/endpoints/e", "t", wanted)
    other = quartet("chat", "e", "-m", "hi", "--bits", "4", "--endpoint", address)
    assert other.status == 65 and "--bits is not how" in other.err
    other = quartet("chat", "e", "-m", "hi", "--torch-dtype", "fp16", "--endpoint", address)
    assert other.status == 65 and "--torch-dtype is not how" in other.err


def test_the_rest_of_xtuners_flags(quartet: Quartet, inference: Inference, address: str) -> None:
    words = ["--torch-dtype", "bf16", "--system-template", "lawyer", "--bot-name", "Aurora", "--no-streamer"]
    done = quartet("chat", "m", "-m", "hi", *words, "--endpoint", address)
    assert (done.status, done.out) == (0, "seen 2\n") and inference.created[0].dtype == "bfloat16"
    assert "中国律师" in inference.turns()[0][0][1] and "{bot_name}" not in inference.turns()[0][0][1]
    missing = quartet("chat", "m", "-m", "hi", "--system-template", "lawyers", "--endpoint", address)
    assert missing.status == 66 and "lawyer" in missing.err
    away = quartet("chat", "m", "-m", "hi", "--image", "https://example.org/a.png", "--endpoint", address)
    assert away.status == 65 and "download it" in away.err


@pytest.mark.parametrize(
    ("flag", "instead"),
    [
        (["--lagent"], "quartet agent"),
        (["--with-plugins", "calculate", "solve"], "quartet agent"),
        (["--offload-folder", "f"], "--bits 4"),
        (["--visual-select-layer", "-2"], "says itself"),
    ],
)
def test_flags_that_are_something_else_here(flag: list[str], instead: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parser().parse_args(["chat", "m", *flag])
    assert left.value.code == 2 and instead in capsys.readouterr().err
