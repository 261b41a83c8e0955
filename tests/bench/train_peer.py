"""TRL's SFTTrainer on the same weights, documents and LoRA settings, in the ways that a user can set it up."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft

from services.finetune.config import RunConfig
from tests.tiny import tiny_tokenizer

BEST: dict[str, Any] = {
    "packing": True,
    "gradient_checkpointing": False,
    "use_liger_kernel": True,
    "per_device_train_batch_size": 4,
}
"""The fastest of those measured, with flex attention in the model; see docs/benchmarks.md."""


def trainer(
    model: Any, config: RunConfig, docs: list[list[int]], steps: int, on_step: Callable[[int], None], **options: Any
) -> Any:
    """An SFTTrainer over `docs`. `on_step` is called after each optimizer step with its number."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            on_step(state.global_step)

    lora = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=int(config.lora.alpha),
        lora_dropout=config.lora.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    folder = Path(tempfile.mkdtemp())
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        max_length=2048,
        gradient_accumulation_steps=1,
        learning_rate=config.optim.lr,
        max_grad_norm=config.optim.clip_norm,
        optim="adamw_torch_fused",
        logging_steps=10_000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": docs}),
        processing_class=AutoTokenizer.from_pretrained(tiny_tokenizer(folder / "tokenizer")),
        peft_config=lora,
        callbacks=[Steps()],
    )
