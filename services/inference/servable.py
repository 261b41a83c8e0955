"""Whether an engine can serve an adapter beside others while it answers, told from its adapter_config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.finetune.errors import FailedPrecondition

ENGINES = ("transformers", "vllm")
MERGE = "merge it into its base (CreateConversionJob with merge) and serve that, or choose the transformers engine"


def check_hot(config: Mapping[str, Any], engine: str, name: str) -> None:
    """FailedPrecondition (MODEL_NOT_SERVABLE), with `verdict` "cannot serve" or "merge needed" in its metadata.

    What is left is "hot LoRA"; that the weights fit the base is seen as the engine loads them.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refused(name, f"is of PEFT's type {kind}; only LoRA can be served", "cannot serve")
    if engine != "vllm":
        return  # PEFT itself, which trained it
    lacks = {
        "DoRA": config.get("use_dora"),
        "layers trained whole (modules_to_save)": config.get("modules_to_save"),
        "trained biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
        "ranks that differ by layer": config.get("rank_pattern") or config.get("alpha_pattern"),
        "single trained tokens": config.get("trainable_token_indices"),
        f"a rank of {config.get('r')}": int(config.get("r", 0)) > 512,
    }
    found = [what for what, there in lacks.items() if there]
    if found:
        raise _refused(name, f"has {' and '.join(found)}, which vLLM would refuse or ignore: {MERGE}", "merge needed")


def _refused(name: str, why: str, verdict: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{name} {why}", reason="MODEL_NOT_SERVABLE", metadata={"model": name, "verdict": verdict}
    )
