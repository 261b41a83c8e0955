"""What only the transformers engine does; what every engine does is in test_suite.py."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from services.inference.engines.port import Step
from services.inference.engines.transformers import PREFILL, TransformersEngine, choose
from tests.inference import published
from tests.inference.engines.asking import GREEDY, PROMPT, WARM, collect


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    # NF4 has blocks of 64: narrower layers than that are no case on a processor.
    root = tmp_path_factory.mktemp("models")
    base = published.wide_model(root / "wide")
    return base, published.tiny_adapter(base, root / "one", 1)


def test_a_long_prompt_is_read_in_steps(folders: tuple[Path, Path]) -> None:
    ids = [(7 * n) % 250 + 3 for n in range(PREFILL + 100)]
    engine = TransformersEngine(folders[0], {}, "float32", 0)

    async def first() -> Step:
        return await anext(engine.generate(ids, GREEDY, ""))

    assert asyncio.run(first()) == Step([])


def test_a_closed_iterator_frees_the_thread(folders: tuple[Path, Path]) -> None:
    engine = TransformersEngine(folders[0], {}, "float32", 0)

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


def test_quantised_engines_answer(folders: tuple[Path, Path]) -> None:
    base, one = folders
    for bits in (4, 8):
        engine = TransformersEngine(base, {"one": one}, "float32", bits)
        ids, finish = asyncio.run(collect(engine, PROMPT, replace(GREEDY, max_tokens=4), "one"))
        assert (len(ids), finish) == (4, "length")


def test_the_last_adapter_leaves_the_bare_model(folders: tuple[Path, Path]) -> None:
    base, one = folders
    engine = TransformersEngine(base, {}, "float32", 0)
    bare = asyncio.run(collect(engine, PROMPT, GREEDY))
    for _ in range(2):
        engine.load("one", one)
        assert asyncio.run(collect(engine, PROMPT, GREEDY, "one")) != bare
        engine.unload("one")
        assert asyncio.run(collect(engine, PROMPT, GREEDY)) == bare


def draws(sampling: Any, logits: Sequence[float]) -> set[int]:
    generator = torch.Generator().manual_seed(0)
    return {choose(torch.tensor(logits), [], [], sampling, generator) for _ in range(300)}


def test_top_k_and_top_p_leave_the_tail_out() -> None:
    logits = [2.0, 1.0, 0.5, -1.0]  # 0.60, 0.22, 0.13, 0.03
    assert draws(WARM, logits) == {0, 1, 2, 3}
    assert draws(replace(WARM, top_k=2), logits) == {0, 1}
    assert draws(replace(WARM, top_p=0.7), logits) == {0, 1}
    assert draws(replace(WARM, top_p=0.01), logits) == {0}
    assert draws(replace(WARM, temperature=0.01), logits) == {0}
