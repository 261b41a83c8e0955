"""Asking engines, and transformers itself, for the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from services.inference.engines.port import Engine, Sampling

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=24, repetition_penalty=1.0, seed=None, eos_ids=())
WARM = replace(GREEDY, temperature=1.0, seed=7)
PROMPT = [1, 80, 90, 100, 70]


async def collect(engine: Engine, ids: Sequence[int], sampling: Sampling, adapter: str = "") -> tuple[list[int], str]:
    steps = [step async for step in engine.generate(ids, sampling, adapter)]
    assert [s.finish for s in steps[:-1]] == [""] * (len(steps) - 1)
    return [i for s in steps for i in s.ids], steps[-1].finish


def reference(
    folder: Path, adapter: Path | None, ids: list[int] = PROMPT, dtype: str = "float32", **how: Any
) -> list[int]:
    """What transformers' own generate (and PEFT's) says."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([ids])
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, **how
    )
    return [int(i) for i in out[0][len(ids) :]]
