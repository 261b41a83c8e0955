"""What an engine could not serve rightly is refused before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services.finetune.errors import FailedPrecondition
from services.finetune.store.artifacts import Manifest, load, publish
from services.inference.servable import check_hot
from tests.common.serving import refused
from tests.inference import published
from tests.inference.conftest import Models, Service
from tests.inference.wire import endpoint

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", "target_modules": ["q_proj"], "use_dora": False}


@pytest.mark.parametrize(
    ("change", "verdict", "engines"),
    [
        ({}, "", ""),
        ({"use_rslora": True}, "", ""),
        ({"peft_type": "PROMPT_TUNING"}, "cannot serve", "vllm transformers"),
        ({"use_dora": True}, "merge needed", "vllm"),
        ({"modules_to_save": ["lm_head"]}, "merge needed", "vllm"),
        ({"bias": "all"}, "merge needed", "vllm"),
        ({"lora_bias": True}, "merge needed", "vllm"),
        ({"rank_pattern": {"q_proj": 4}}, "merge needed", "vllm"),
        ({"trainable_token_indices": [3]}, "merge needed", "vllm"),
        ({"r": 1024}, "merge needed", "vllm"),
    ],
)
def test_verdicts(change: dict[str, object], verdict: str, engines: str) -> None:
    for engine in ("vllm", "transformers"):
        if engine not in engines.split():
            check_hot({**PLAIN, **change}, engine, "it")
            continue
        with pytest.raises(FailedPrecondition) as caught:
            check_hot({**PLAIN, **change}, engine, "it")
        assert (caught.value.reason, caught.value.metadata["verdict"]) == ("MODEL_NOT_SERVABLE", verdict)


def test_it_is_checked_at_submit(service: Service, models: Models, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, "use_dora": True}))
    published.adapter(service.store, tmp_path, "dora", models.tiny)
    with refused(FailedPrecondition, "MODEL_NOT_SERVABLE") as error:
        endpoint(service.stub, "fast", adapters=[("a", "dora")], engine="vllm", validate_only=True)
    assert "DoRA" in error[0].message
    assert error[0].metadata["verdict"] == "merge needed"
    assert endpoint(service.stub, "slow", adapters=[("a", "dora")], validate_only=True).engine == "transformers"


@pytest.mark.parametrize(
    ("kind", "quantization", "asked", "way_out"),
    [
        ("exported", "", {}, "serve the model that it was made from"),
        ("vision_tower", "", {}, "assemble a LLaVA model with it"),
        ("quantized", "fp8", {"bits": 4}, "leave bits out"),
        ("base", "", {"engine": "vllm", "bits": 8}, "quantise to int8 first"),
        ("base", "", {"engine": "vllm", "bits": 4, "dtype": "float32"}, "choose bfloat16"),
        ("quantized", "int4", {"engine": "vllm", "dtype": "float32"}, "choose bfloat16"),
        ("quantized", "fp4", {"engine": "vllm", "dtype": "float32"}, "choose bfloat16"),
    ],
)
def test_weights_that_no_engine_could_load_are_refused_at_submit(
    service: Service, models: Models, kind: str, quantization: str, asked: dict[str, Any], way_out: str
) -> None:
    weights(service, models, kind, quantization)
    with refused(FailedPrecondition, "MODEL_NOT_SERVABLE") as error:
        endpoint(service.stub, "no", "weights", validate_only=True, **asked)
    assert way_out in error[0].message


@pytest.mark.parametrize(
    ("quantization", "asked", "dtype"),
    [
        ("nf4", {"engine": "vllm"}, "bfloat16"),
        ("nf4", {"engine": "vllm", "dtype": "float16"}, "float16"),
        ("nf4", {"dtype": "float32"}, "float32"),
        ("fp8", {"engine": "vllm", "dtype": "float32"}, "float32"),
        ("int8", {"engine": "vllm"}, ""),
    ],
)
def test_quantised_models_are_taken(
    service: Service, models: Models, quantization: str, asked: dict[str, Any], dtype: str
) -> None:
    weights(service, models, "quantized", quantization)
    assert endpoint(service.stub, "yes", "weights", validate_only=True, **asked).dtype == dtype


def weights(service: Service, models: Models, kind: Any, quantization: str) -> None:
    """Name a model of that kind `weights`."""
    source = load(service.store, models.tiny)
    made = Manifest(kind, source.files, source.parents, {**source.meta, "quantization": quantization})
    published.named(service.store, "weights", publish(service.store, made), kind)
