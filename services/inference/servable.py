"""What an engine can serve, told before it is started: forms of weights, and adapters from their adapter_config.json."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from services.finetune.errors import FailedPrecondition

ENGINES = ("transformers", "vllm")
MERGE = "merge it into its base (CreateConversionJob with merge) and serve that, or choose the transformers engine"


def check_hot(config: Mapping[str, Any], engine: str, name: str, parts: Collection[str] = ()) -> None:
    """FailedPrecondition (MODEL_NOT_SERVABLE), with `verdict` "cannot serve" or "merge needed" in its metadata. `parts` are
    those of a LLaVA model that the adapter changes.

    What is left is "hot LoRA"; that the weights fit the base is seen as the engine loads them.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refused(name, f"is of PEFT's type {kind}; only LoRA can be served", "cannot serve")
    if engine != "vllm":
        return  # PEFT itself, which trained it
    lacks = {
        "LoRA on the vision tower": "vision_tower" in parts,
        "a projector": "projector" in parts,
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


def check_weights(engine: str, dtype: str, bits: int, four_bits: bool) -> None:
    """FailedPrecondition (MODEL_NOT_SERVABLE) if vLLM has no such weights. `bits` are those to quantise to in loading,
    `four_bits` is whether the model has 4 already.

    In float32 vLLM 0.32 dies of them: of bitsandbytes' in loading, of compressed-tensors' with the first request.
    """
    if engine != "vllm":
        return
    if bits == 8:
        raise FailedPrecondition(
            "vLLM does not quantise to 8 bits as it loads: quantise to int8 first (CreateConversionJob with quantize), "
            "choose 4, or the transformers engine",
            reason="MODEL_NOT_SERVABLE",
        )
    if (bits or four_bits) and dtype == "float32":
        raise FailedPrecondition(
            "vLLM does not compute with weights of 4 bits in float32: choose bfloat16 as the dtype, or the transformers "
            "engine",
            reason="MODEL_NOT_SERVABLE",
        )


def _refused(name: str, why: str, verdict: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"{name} {why}", reason="MODEL_NOT_SERVABLE", metadata={"model": name, "verdict": verdict}
    )
