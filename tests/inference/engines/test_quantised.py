"""Models that our workers quantised, in each engine, beside what transformers makes of the same folder."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from services.finetune.convert import convert
from services.finetune.errors import FailedPrecondition
from services.finetune.orders import ArtifactRef, ConvertRun, ImportTask, QuantizeTask
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import open_store
from services.finetune.store.artifacts import load, materialise
from services.inference.engines.transformers import TransformersEngine
from tests.finetune.convert.test_quantize import calibration
from tests.inference import published
from tests.inference.engines.asking import GREEDY, PROMPT, collect, reference

EIGHT_BITS, FOUR_BITS = ("int8", "fp8"), ("nf4", "fp4", "int4", "gptq")
Quantised = Callable[[str], Path]


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    """The folder of a model in the form that is named; "" is what all are made from."""
    root = tmp_path_factory.mktemp("quantised")
    store = open_store((root / "store").as_uri())
    made: dict[str, Path] = {}

    def order(name: str, **task: Any) -> str:
        (work := root / f"work{name}").mkdir()
        raise_fence(store, f"jobs/j{name}", 1)
        with Attempt(store, f"jobs/j{name}", 1) as attempt:
            attempt.claim({"pid": 1})
            run = ConvertRun(job="workspaces/w/conversionJobs/j", **task)
            digest = str(convert(run, attempt, threading.Event(), work)["model"])
        made[name] = materialise(store, load(store, digest), root / f"model{name}")
        return digest

    wide = published.wide_model(root / "wide")
    base = ArtifactRef(
        name="workspaces/w/models/m", digest=order("", import_model=ImportTask(local_path=str(wide), dtype="bfloat16"))
    )

    def folder(method: Any) -> Path:
        if method not in made:
            rows: Any = {"calibration": calibration(store), "calibration_rows": 8, "max_length": 64}
            order(method, quantize=QuantizeTask(model=base, method=method, **(rows if method == "gptq" else {})))
        return made[method]

    return folder


@pytest.mark.parametrize("method", [*EIGHT_BITS, *FOUR_BITS])
def test_the_transformers_engine_says_what_transformers_says(quantised: Quantised, method: str) -> None:
    folder = quantised(method)
    engine = TransformersEngine(folder, {}, "bfloat16", 0)
    assert asyncio.run(collect(engine, PROMPT, GREEDY))[0] == reference(folder, None, dtype="bfloat16")


def test_transformers_without_what_reads_a_form_is_no_crash(
    quantised: Quantised, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_compressed_tensors.is_compressed_tensors_available", lambda: False
    )
    with pytest.raises(FailedPrecondition, match="compressed-tensors") as caught:
        TransformersEngine(quantised("int4"), {}, "bfloat16", 0)
    assert caught.value.reason == "MODEL_NOT_SERVABLE"


async def vllm(folder: Path, dtype: str) -> list[int]:
    from services.inference.engines.vllm import VllmEngine

    engine = await VllmEngine.open(folder, {}, dtype, 0)
    try:
        return (await collect(engine, PROMPT, GREEDY))[0]
    finally:
        engine.close()


@pytest.mark.vllm
@pytest.mark.parametrize("method", EIGHT_BITS)
def test_vllm_says_what_transformers_says(quantised: Quantised, method: str) -> None:
    assert asyncio.run(vllm(quantised(method), "float32")) == reference(quantised(method), None)


@pytest.mark.vllm
@pytest.mark.parametrize("method", FOUR_BITS)
def test_vllm_says_what_is_as_likely_to_transformers(quantised: Quantised, method: str) -> None:
    """In bfloat16, as there is no float32, the two round in other places, and a near tie may fall the other way."""
    found = asyncio.run(vllm(quantised(method), "bfloat16"))
    assert len(found) == GREEDY.max_tokens
    model: Any = AutoModelForCausalLM.from_pretrained(quantised(method), dtype=torch.bfloat16)
    with torch.no_grad():
        logits_LV = model(torch.tensor([PROMPT + found])).logits[0, len(PROMPT) - 1 : -1].float()
    behind_L = logits_LV.amax(-1) - logits_LV.gather(-1, torch.tensor(found)[:, None])[:, 0]
    assert behind_L.max() < 0.1 * logits_LV.std()


@pytest.mark.vllm
@pytest.mark.parametrize("method", FOUR_BITS)
def test_vllm_refuses_four_bits_in_float32_before_its_processes_die_of_it(quantised: Quantised, method: str) -> None:
    with pytest.raises(FailedPrecondition, match="choose bfloat16") as caught:
        asyncio.run(vllm(quantised(method), "float32"))
    assert caught.value.reason == "MODEL_NOT_SERVABLE"


@pytest.mark.vllm
def test_vllm_without_its_plugin_says_what_to_install(quantised: Quantised, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import quantization
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    left = [m for m in quantization.QUANTIZATION_METHODS if m != "bitsandbytes"]
    monkeypatch.setattr(quantization, "QUANTIZATION_METHODS", left)
    with pytest.raises(FailedPrecondition, match="vllm-bnb-plugin") as caught:
        asyncio.run(vllm(quantised("nf4"), "bfloat16"))
    assert caught.value.reason == "ENGINE_MISSING"


@pytest.mark.vllm
def test_the_plugin_is_kept_from_a_vllm_that_reads_bitsandbytes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import distributions

    from services.inference.engines.vllm import keep_plugin_out

    monkeypatch.setenv("VLLM_PLUGINS", "")  # so that it is as it was afterwards
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    keep_plugin_out()
    installed = {p.name for d in distributions() for p in d.entry_points if p.group.startswith("vllm.")}
    assert installed - set(os.environ["VLLM_PLUGINS"].split(",")) == {"bitsandbytes"}
