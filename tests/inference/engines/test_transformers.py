"""The transformers engine against transformers and PEFT themselves."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.finetune.errors import FailedPrecondition
from services.inference.engines.port import Sampling, Step
from services.inference.engines.transformers import PREFILL, TransformersEngine, choose
from tests.inference import published

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=24, repetition_penalty=1.0, seed=None, eos_ids=())
WARM = replace(GREEDY, temperature=1.0, seed=7)
PROMPT = [1, 80, 90, 100, 70]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return published.folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def engine(folders: tuple[Path, Path, Path]) -> TransformersEngine:
    # Names that are already something else inside of modules and of PEFT.
    return TransformersEngine(folders[0], {"train": folders[1], "lora": folders[2]}, "float32", 0)


async def collect(
    engine: TransformersEngine, ids: Sequence[int], sampling: Sampling, adapter: str = ""
) -> tuple[list[int], str]:
    steps = [step async for step in engine.generate(ids, sampling, adapter)]
    assert [s.finish for s in steps[:-1]] == [""] * (len(steps) - 1)
    return [i for s in steps for i in s.ids], steps[-1].finish


def answer(engine: TransformersEngine, sampling: Sampling, adapter: str = "") -> tuple[list[int], str]:
    return asyncio.run(collect(engine, PROMPT, sampling, adapter))


def reference(folder: Path, adapter: Path | None, ids: list[int] = PROMPT, **how: Any) -> list[int]:
    """What transformers' own generate (and PEFT's) says."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([ids])
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, **how
    )
    return [int(i) for i in out[0][len(ids) :]]


def test_greedy_is_what_transformers_generates(engine: TransformersEngine, folders: tuple[Path, Path, Path]) -> None:
    assert answer(engine, GREEDY) == (reference(folders[0], None), "length")


def test_the_repetition_penalty_is_transformers(engine: TransformersEngine, folders: tuple[Path, Path, Path]) -> None:
    wanted = reference(folders[0], None, repetition_penalty=1.5)
    assert wanted != reference(folders[0], None)
    assert answer(engine, replace(GREEDY, repetition_penalty=1.5))[0] == wanted


def test_adapters_are_pefts_and_do_not_mix(engine: TransformersEngine, folders: tuple[Path, Path, Path]) -> None:
    base, one, two = (reference(folders[0], adapter) for adapter in (None, folders[1], folders[2]))
    assert len({tuple(base), tuple(one), tuple(two)}) == 3

    async def together() -> list[list[int]]:
        both = [collect(engine, PROMPT, GREEDY, alias) for alias in ("train", "", "lora", "train")]
        return [ids for ids, _ in await asyncio.gather(*both)]

    assert asyncio.run(together()) == [one, base, two, one]


def test_a_long_prompt_is_read_in_steps(folders: tuple[Path, Path, Path]) -> None:
    ids = [(7 * n) % 250 + 3 for n in range(PREFILL + 100)]
    engine = TransformersEngine(folders[0], {}, "float32", 0)

    async def steps() -> list[Step]:
        return [s async for s in engine.generate(ids, GREEDY, "")]

    found = asyncio.run(steps())
    assert found[0] == Step([])
    assert [i for s in found for i in s.ids] == reference(folders[0], None, ids)


def test_eos_ends_the_answer_and_is_not_part_of_it(engine: TransformersEngine) -> None:
    whole, _ = answer(engine, GREEDY)
    end = whole[5]
    assert answer(engine, replace(GREEDY, eos_ids=(end,))) == (whole[: whole.index(end)], "stop")


def test_max_tokens(engine: TransformersEngine) -> None:
    ids, finish = answer(engine, replace(GREEDY, max_tokens=3))
    assert (len(ids), finish) == (3, "length")


def test_a_seed_decides(engine: TransformersEngine) -> None:
    first = answer(engine, WARM)
    assert answer(engine, WARM) == first
    assert answer(engine, replace(WARM, seed=8)) != first
    assert answer(engine, replace(WARM, seed=None)) != answer(engine, replace(WARM, seed=None))


def test_a_closed_iterator_frees_the_thread(engine: TransformersEngine) -> None:
    async def leave() -> None:
        steps: Any = engine.generate(PROMPT, replace(GREEDY, max_tokens=400), "")
        assert (await anext(steps)).ids
        await steps.aclose()
        for _ in range(200):
            if not any(t.name == "generate" for t in threading.enumerate()):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the thread goes on without a listener")

    asyncio.run(leave())


def test_a_long_answer_does_not_hold_up_a_short_one(engine: TransformersEngine) -> None:
    order: list[str] = []

    async def listen(name: str, count: int) -> None:
        async for _ in engine.generate(PROMPT, replace(GREEDY, max_tokens=count), ""):
            order.append(name)

    async def both() -> None:
        await asyncio.gather(listen("long", 120), listen("short", 10))

    asyncio.run(both())
    # Step by step in turn: when the short one is done, the long one is about as far.
    assert order[: len(order) - order[::-1].index("short")].count("long") < 40


def test_quantised_engines_answer(tmp_path: Path) -> None:
    # NF4 has blocks of 64: narrower layers than that are no case on a processor.
    base = published.wide_model(tmp_path / "wide")
    adapter = published.tiny_adapter(base, tmp_path / "one", 1)
    for bits in (4, 8):
        engine = TransformersEngine(base, {"one": adapter}, "float32", bits)
        ids, finish = answer(engine, replace(GREEDY, max_tokens=4), "one")
        assert (len(ids), finish) == (4, "length")


def test_what_cannot_be_loaded_is_refused(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(FailedPrecondition) as caught:
        TransformersEngine(bad, {}, "float32", 0)
    assert caught.value.reason == "MODEL_NOT_SERVABLE"
    with pytest.raises(FailedPrecondition) as caught:
        TransformersEngine(folders[0], {"empty": bad}, "float32", 0)
    assert caught.value.reason == "MODEL_NOT_SERVABLE"


def draws(sampling: Sampling, logits: Sequence[float]) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {choose(torch.tensor(logits), [], sampling, generator) for _ in range(300)}


def test_top_k_and_top_p_leave_the_tail_out() -> None:
    logits = [2.0, 1.0, 0.5, -1.0]  # 0.60, 0.22, 0.13, 0.03
    assert draws(WARM, logits) == {0, 1, 2, 3}
    assert draws(replace(WARM, top_k=2), logits) == {0, 1}
    assert draws(replace(WARM, top_p=0.7), logits) == {0, 1}
    assert draws(replace(WARM, top_p=0.01), logits) == {0}
    assert draws(replace(WARM, temperature=0.01), logits) == {0}


def test_adapters_come_and_go(folders: tuple[Path, Path, Path]) -> None:
    base, one, two = folders
    engine = TransformersEngine(base, {}, "float32", 0)
    bare = answer(engine, GREEDY)
    engine.load("one", one)
    first = answer(engine, GREEDY, "one")
    engine.load("two", two)
    assert (first[0], answer(engine, GREEDY, "two")[0]) == (reference(base, one), reference(base, two))
    engine.unload("one")
    assert answer(engine, GREEDY, "two")[0] == reference(base, two)
    engine.unload("two")
    assert answer(engine, GREEDY) == bare
    engine.load("one", one)
    assert answer(engine, GREEDY, "one") == first


def test_a_refused_adapter_leaves_the_others_as_they_were(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, one, _ = folders
    shutil.copytree(one, tmp_path / "other")
    config = json.loads((one / "adapter_config.json").read_text())
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    engine = TransformersEngine(base, {"one": one}, "float32", 0)
    before = answer(engine, GREEDY, "one")
    with pytest.raises(FailedPrecondition, match="other"):
        engine.load("other", tmp_path / "other")
    assert answer(engine, GREEDY, "one") == before
