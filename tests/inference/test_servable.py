"""What an engine could not serve rightly is refused before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.finetune.errors import FailedPrecondition
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
