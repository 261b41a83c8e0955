"""What every engine must do: the port's suite. The answers are compared with transformers' and PEFT's own."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.finetune.errors import FailedPrecondition
from services.finetune.tokenizer import Tokenizer
from services.inference.engines.port import Engine, Form, Sampling, Step
from tests.inference import published
from tests.inference.engines.asking import GREEDY, PROMPT, WARM, collect, reference

Open = Callable[[Path, Mapping[str, Path]], Coroutine[Any, Any, Engine]]


async def transformers(folder: Path, adapters: Mapping[str, Path]) -> Engine:
    from services.inference.engines.transformers import TransformersEngine

    return TransformersEngine(folder, adapters, "float32", 0)


async def vllm(folder: Path, adapters: Mapping[str, Path]) -> Engine:
    from services.inference.engines.vllm import VllmEngine

    return await VllmEngine.open(folder, adapters, "float32", 0, measured=True)


class Running:
    """An engine in an event loop of its own, which is where it must be asked from."""

    def __init__(self, open_engine: Open) -> None:
        self.open = open_engine
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.engine: Engine

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def answer(self, sampling: Sampling, adapter: str = "", ids: Sequence[int] = PROMPT) -> tuple[list[int], str]:
        found: tuple[list[int], str] = self.do(collect(self.engine, ids, sampling, adapter))
        return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Heads of 32: vLLM's kernels for processors know no smaller ones."""
    root = tmp_path_factory.mktemp("models")
    base = published.wide_model(root / "base")
    return base, published.tiny_adapter(base, root / "one", 1), published.tiny_adapter(base, root / "two", 2)


@pytest.fixture(
    scope="module", params=[transformers, pytest.param(vllm, marks=pytest.mark.vllm)], ids=lambda f: f.__name__
)
def running(
    request: pytest.FixtureRequest, folders: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    made = Running(request.param)
    base = tmp_path_factory.mktemp("engine") / "base"
    shutil.copytree(folders[0], base)
    # Names that are already something else inside of modules and of PEFT.
    made.engine = made.do(made.open(base, {"train": folders[1], "lora": folders[2]}))
    for weights in base.glob("*.safetensors"):
        weights.unlink()
    yield made
    assert made.engine.alive()
    made.engine.close()
    made.loop.call_soon_threadsafe(made.loop.stop)
    made.thread.join()
    made.loop.close()


def test_greedy_is_what_transformers_generates(running: Running, folders: tuple[Path, Path, Path]) -> None:
    assert running.answer(GREEDY) == (reference(folders[0], None), "length")


def test_a_long_prompt_is_what_transformers_reads(running: Running, folders: tuple[Path, Path, Path]) -> None:
    ids = [(7 * n) % 250 + 3 for n in range(1100)]
    assert running.answer(GREEDY, ids=ids)[0] == reference(folders[0], None, ids)


def test_the_repetition_penalty_is_transformers(running: Running, folders: tuple[Path, Path, Path]) -> None:
    wanted = reference(folders[0], None, repetition_penalty=1.5)
    assert wanted != reference(folders[0], None)
    assert running.answer(replace(GREEDY, repetition_penalty=1.5))[0] == wanted


def test_penalties_are_openais(running: Running, folders: tuple[Path, Path, Path]) -> None:
    """logit - count x frequency - (count > 0) x presence, of the answer's tokens alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    for frequency, presence in ((1.5, 0.0), (0.0, 1.5), (-2.0, 0.5)):
        said: list[int] = []
        for _ in range(GREEDY.max_tokens):
            with torch.inference_mode():
                logits_V = model(torch.tensor([PROMPT + said])).logits[0, -1]
            count_V = torch.tensor(said, dtype=torch.int64).bincount(minlength=len(logits_V))
            said.append(int((logits_V - frequency * count_V - presence * (count_V > 0)).argmax()))
        assert said != running.answer(GREEDY)[0]
        assert running.answer(replace(GREEDY, frequency_penalty=frequency, presence_penalty=presence))[0] == said


def test_min_p_of_one_is_greedy(running: Running) -> None:
    assert running.answer(replace(WARM, min_p=1.0))[0] == running.answer(GREEDY)[0] != running.answer(WARM)[0]


def test_a_bias_forbids_and_forces(running: Running) -> None:
    plain, _ = running.answer(GREEDY)
    without, _ = running.answer(replace(GREEDY, logit_bias={plain[0]: -100.0}))
    assert without[0] != plain[0] and plain[0] not in without
    assert set(running.answer(replace(GREEDY, logit_bias={plain[3]: 100.0}))[0]) == {plain[3]}


def test_adapters_are_pefts_and_do_not_mix(running: Running, folders: tuple[Path, Path, Path]) -> None:
    base, one, two = (reference(folders[0], adapter) for adapter in (None, folders[1], folders[2]))
    assert len({tuple(base), tuple(one), tuple(two)}) == 3

    async def together() -> list[list[int]]:
        asked = [collect(running.engine, PROMPT, GREEDY, alias) for alias in ("train", "", "lora", "train")]
        return [ids for ids, _ in await asyncio.gather(*asked)]

    assert running.do(together()) == [one, base, two, one]


def test_eos_ends_the_answer_and_is_not_part_of_it(running: Running) -> None:
    whole, _ = running.answer(GREEDY)
    end = whole[5]
    assert running.answer(replace(GREEDY, eos_ids=(end,))) == (whole[: whole.index(end)], "stop")


def test_only_the_ends_that_are_named_end_an_answer(running: Running) -> None:
    # The model's own config names token 2, which a request may leave out.
    found, finish = running.answer(replace(WARM, max_tokens=400, top_k=0))
    assert (len(found), finish) == (400, "length")


def test_max_tokens_and_the_context(running: Running) -> None:
    ids, finish = running.answer(replace(GREEDY, max_tokens=3))
    assert (len(ids), finish) == (3, "length")
    assert running.engine.context_length == 2048
    assert running.engine.vocabulary == 259


def test_a_seed_decides(running: Running) -> None:
    first = running.answer(WARM)
    assert running.answer(WARM) == first
    assert running.answer(replace(WARM, seed=8)) != first
    assert running.answer(replace(WARM, seed=None)) != running.answer(replace(WARM, seed=None))


def test_top_k_of_one_is_greedy(running: Running) -> None:
    assert running.answer(replace(WARM, top_k=1)) == running.answer(GREEDY)
    assert running.answer(replace(WARM, top_p=1e-6)) == running.answer(GREEDY)


SCHEMA = {
    "type": "object",
    "properties": {"b": {"type": "integer", "minimum": 0, "maximum": 99}, "a": {"enum": ["x", "y"]}},
    "required": ["b", "a"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        (Form("json_schema", json.dumps(SCHEMA)), r'\{"b":[0-9]{1,2},"a":"[xy]"\}'),
        (Form("regex", "(yes|no), [0-9]{3}"), "(yes|no), [0-9]{3}"),
        (Form("grammar", 'start: "<" word ">"\nword: /[a-c]{2}/ | /[x-z]/'), "<([a-c]{2}|[x-z])>"),
    ],
    ids=lambda given: given.kind if isinstance(given, Form) else "",
)
@pytest.mark.parametrize("adapter", ["", "train"])
def test_an_answer_has_the_form_that_is_asked_for(
    running: Running, folders: tuple[Path, Path, Path], form: Form, pattern: str, adapter: str
) -> None:
    tokenizer = Tokenizer.from_files(folders[0])
    for sampling in (GREEDY, WARM):
        asked = replace(sampling, max_tokens=200, form=form, eos_ids=tokenizer.eos_ids)
        ids, finish = running.answer(asked, adapter)
        assert finish == "stop"
        assert re.fullmatch(pattern, tokenizer.decode(ids))


def test_how_likely_tokens_were(running: Running, folders: tuple[Path, Path, Path]) -> None:
    async def steps() -> list[Step]:
        return [s async for s in running.engine.generate(PROMPT, replace(WARM, max_tokens=8, logprobs=3), "")]

    found = [(i, said) for s in running.do(steps()) for i, said in zip(s.ids, s.likely, strict=True)]
    ids = [i for i, _ in found]
    model: Any = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    with torch.no_grad():
        logits_LV = model(input_ids=torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1]
    for (token, said), logprobs_V in zip(found, logits_LV.log_softmax(-1), strict=True):
        assert said.logprob == pytest.approx(float(logprobs_V[token]), abs=1e-4)
        top = logprobs_V.topk(3)
        assert [i for i, _ in said.top] == top.indices.tolist()
        assert [value for _, value in said.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_the_use_of_a_cache_is_told_while_an_answer_is_under_way(running: Running) -> None:
    async def ask() -> list[float]:
        steps = running.engine.generate(PROMPT, replace(GREEDY, max_tokens=200, eos_ids=()), "")
        return [running.engine.cache_use() async for _ in steps]

    told = running.do(ask())
    # None is set aside by transformers, so no part of one is told.
    assert all(map(math.isnan, told)) if running.open is transformers else 0 < max(told) < 1


def test_a_closed_iterator_leaves_the_engine_free(running: Running) -> None:
    async def leave() -> None:
        for _ in range(30):
            steps: Any = running.engine.generate(PROMPT, replace(GREEDY, max_tokens=2000), "")
            assert (await anext(steps)).ids
            await steps.aclose()

    running.do(leave())
    # Thirty answers of 2000 tokens would stand in the way of this one.
    assert running.answer(replace(GREEDY, max_tokens=3))[1] == "length"


def test_a_long_answer_does_not_hold_up_a_short_one(running: Running) -> None:
    order: list[str] = []

    async def listen(name: str, count: int) -> None:
        async for step in running.engine.generate(PROMPT, replace(GREEDY, max_tokens=count), ""):
            order.extend([name] * len(step.ids))

    async def both() -> None:
        await asyncio.gather(listen("long", 400), listen("short", 10))

    running.do(both())
    # Step by step in turn: while the short one is said, the long one gets about as far. How far it gets before hangs on when
    # a loaded machine lets the short one begin, but an engine that answers one after another says all of it.
    before, said = order.index("short"), order[: len(order) - order[::-1].index("short")]
    assert said[before:].count("long") < 40 and said.count("long") < 120


def test_adapters_come_and_go(running: Running, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, two = folders
    engine = running.engine
    shutil.copytree(one, tmp_path / "brief")
    engine.load("new", tmp_path / "brief")
    shutil.rmtree(tmp_path / "brief")
    assert running.answer(GREEDY, "new")[0] == reference(base, one)
    engine.unload("new")
    engine.load("new", two)
    assert running.answer(GREEDY, "new")[0] == reference(base, two)
    assert running.answer(GREEDY)[0] == reference(base, None)
    engine.unload("new")


def test_a_refused_adapter_leaves_the_others_as_they_were(
    running: Running, folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    one = folders[1]
    before = running.answer(GREEDY, "train")
    shutil.copytree(one, tmp_path / "other")
    config = json.loads((one / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    (tmp_path / "other" / "adapter_model.safetensors").write_bytes(b"no tensors")
    (tmp_path / "empty").mkdir()
    for name in ("other", "empty"):
        with pytest.raises(FailedPrecondition, match=name) as caught:
            running.engine.load(name, tmp_path / name)
        assert caught.value.reason == "MODEL_NOT_SERVABLE"
    assert running.answer(GREEDY, "train") == before


def test_a_model_that_cannot_be_loaded_is_refused(running: Running, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(FailedPrecondition) as caught:
        running.do(running.open(bad, {}))
    assert caught.value.reason == "MODEL_NOT_SERVABLE" and "no-such-model" in caught.value.message


def test_what_answers_does_not_embed(running: Running) -> None:
    with pytest.raises(FailedPrecondition, match="serve an encoder") as caught:
        running.do(running.engine.embed([PROMPT]))
    assert caught.value.reason == "EMBEDDINGS_UNSUPPORTED"
