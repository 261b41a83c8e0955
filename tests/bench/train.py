"""`make bench-train`: our training step and TRL's SFTTrainer, in turn on the same weights in one process.

On a GPU: correctness first (kernels, the loss of 200 steps, documents apart), then tokens a second, peak memory and MFU of
Llama 2 7B's and Qwen 1.8B's shapes. Without one: SmolLM2-135M's shape. `--only NAMES` picks sections, `--json FILE` keeps
all numbers. Tokens are those of documents, never padding.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from services.finetune.orders import ArtifactRef, TrainRun
from services.finetune.store import open_store
from services.finetune.train import checkpoint
from services.finetune.train.attention import attend_by_document
from services.finetune.train.engine import choose
from services.finetune.train.methods import adapt
from services.finetune.train.model import trainable
from services.finetune.train.step import Stepper
from tests.bench import train_peer
from tests.bench.train_shapes import (
    VOCABULARY,
    blocks_of,
    documents,
    matmul_parameters,
    random_causal,
    run_config,
    twin,
)

PEAK_FLOPS = 989e12
"""H100 SXM, dense bfloat16, by its datasheet."""
GIB = 2**30
NUMBERS: dict[str, Any] = {}


class Ours:
    """Our trainer's engine and optimizer on a model, for one or more sizes of a step."""

    def __init__(
        self, model: Any, quantised: bool, docs: list[list[int]], dtype: torch.dtype, batches: tuple[int, ...]
    ) -> None:
        device = next(model.parameters()).device
        blocks = blocks_of(docs)
        if device.type == "cpu":
            attend_by_document(model)
        self.model = adapt(model, run_config(quantised, batches[0]))
        self.engine, self.why = choose(self.model, blocks, device, dtype, run_config(quantised, batches[0]).model)
        self.parameters = trainable(self.model)
        self.tokens = 0
        self.notes: list[str] = []
        self.steps = {
            batch: Stepper(
                run_config(quantised, batch), self.model, self.parameters, blocks, self.engine, self._tell,
                lambda text, _: self.notes.append(text),
            )
            for batch in batches
        }  # fmt: skip

    def _tell(self, told: Any) -> None:
        self.tokens += told.taken.tokens

    def window(self, steps: int, batch: int) -> tuple[float, float]:
        """(tokens a second, peak GiB) of so many steps."""
        self.tokens = 0
        reset_peak()
        synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            self.steps[batch].take()
        self.steps[batch].settle()
        synchronize()
        return self.tokens / (time.perf_counter() - began), peak_gib()

    def frugal_window(self, steps: int, batch: int) -> tuple[float, float]:
        """The same with every layer run forward twice."""
        fused: Any = getattr(self.engine, "fused", None)
        before, fused.recomputed = fused.recomputed, len(fused.layers)
        done = self.window(steps, batch)
        fused.recomputed = before
        return done


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def held_gib() -> float:
    return torch.cuda.memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def free_all() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def versus(
    shape: str,
    quantised: bool,
    batches: tuple[int, ...],
    windows: int = 5,
    per_window: int = 4,
    warm: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "flex_attention",
    **peer: Any,
) -> dict[str, Any]:
    """Windows of ours and TRL's in turn, after `warm` steps of each. TRL's batch is the first of `batches`; ours takes
    all of them. Peaks leave out what only the other one holds."""
    free_all()
    batch, held = batches[0], {"before": held_gib()}
    docs = documents(batch * (warm + per_window * windows) * 8, VOCABULARY[shape])
    causal = random_causal(shape, dtype, quantised)
    other = twin(causal)
    other.config._attn_implementation = attention
    held["base"] = held_gib() - held["before"]
    ours = Ours(causal, quantised, docs, dtype, batches)
    for size in batches:
        ours.window(warm, size)
    held["ours"] = held_gib() - held["base"] - held["before"]
    rows: dict[str, list[tuple[float, float]]] = {}
    options = {**train_peer.BEST, "per_device_train_batch_size": batch, **peer}
    state = {"began": 0.0, "tokens": 0}

    def on_step(step: int) -> None:
        if step < warm or (step - warm) % per_window:
            return
        synchronize()
        if state["began"]:
            rate = state["tokens"] / (time.perf_counter() - state["began"])
            rows.setdefault("TRL", []).append((rate, peak_gib() - held["ours"] - held["before"]))
            measure_ours(ours, per_window, held, rows)
        state.update(began=0.0, tokens=0)
        reset_peak()
        synchronize()
        state["began"] = time.perf_counter()

    trainer = train_peer.trainer(
        other, run_config(quantised, batch), docs, warm + per_window * windows, on_step, **options
    )
    count_tokens(trainer, state)
    trainer.train()
    del trainer
    notes = "; ".join([ours.why, *ours.notes])
    tell(f"{shape} {'QLoRA' if quantised else 'LoRA'} beside TRL, batch {batch}, {attention}: {notes}", rows, shape)
    return {name: [list(r) for r in values] for name, values in rows.items()}


def measure_ours(ours: Ours, steps: int, held: dict[str, float], rows: dict[str, list[tuple[float, float]]]) -> None:
    """A window of each kind."""
    apart = held_gib() - held["base"] - held["ours"]
    kinds = {f"batch {size}": (ours.window, size) for size in ours.steps}
    if hasattr(ours.engine, "fused"):
        kinds["recomputing"] = (ours.frugal_window, next(iter(ours.steps)))
    for name, (window, size) in kinds.items():
        rate, peak = window(steps, size)
        rows.setdefault(f"ours, {name}", []).append((rate, peak - apart))


def count_tokens(trainer: Any, state: dict[str, Any]) -> None:
    """Count the document tokens of the batches that TRL trains on."""
    collate = trainer.data_collator

    def counted(rows: Any) -> Any:
        state["tokens"] += sum(len(row["input_ids"]) for row in rows)
        return collate(rows)

    trainer.data_collator = counted


def tell(title: str, rows: dict[str, list[tuple[float, float]]], shape: str) -> None:
    """A line for each way: tokens a second, peak, MFU, and how it stands to TRL's window beside it."""
    print(title)
    for name, values in rows.items():
        rates, peak = [r for r, _ in values], max(p for _, p in values)
        mfu = statistics.median(rates) * 4 * matmul_parameters(shape) / PEAK_FLOPS
        ratio = [a / b for (a, _), (b, _) in zip(values, rows["TRL"], strict=True)]
        memory = peak / max(max(p for _, p in rows["TRL"]), 1e-9)
        print(
            f"  {name:20} {spread(rates)} tok/s  {peak:5.1f} GiB ({memory:.2f})  MFU {mfu:.2f}  ratio {spread(ratio, 2)}"
        )
    print(end="", flush=True)


def spread(values: list[float], digits: int = 0) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:,.{digits}f} (min {low:,.{digits}f}, max {high:,.{digits}f}, n {len(values)})"


def checkpoints(shape: str = "7B", steps: int = 12, rounds: int = 5) -> dict[str, Any]:
    """What a checkpoint costs the step: windows with one in them beside windows without, in turn. Goal 1 % of 50 steps."""
    free_all()
    docs = documents(4 * steps * (2 * rounds + 2) * 8, VOCABULARY[shape])
    config = run_config(False, 4)
    ours = Ours(random_causal(shape, torch.bfloat16), False, docs, torch.bfloat16, (4,))
    run = TrainRun(job="bench", config=config, base=ArtifactRef(name="base", digest="sha256:0"), datasets=())
    without, lost = [], []
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(1) as saver:
        store = open_store(f"file://{home}/store")
        for n in range(rounds + 1):
            plain = seconds(lambda: ours.window(steps, 4))
            began = time.perf_counter()
            done = save_beside(ours, saver, store, run, Path(home) / str(n))
            ours.window(steps, 4)
            if n:  # the first one finds no pinned memory yet
                lost.append(time.perf_counter() - began - plain)
                without.append(plain / steps)
            done.result()
            shutil.rmtree(Path(home) / str(n))
    cost = [a / (50 * b) for a, b in zip(lost, without, strict=True)]
    print(
        f"checkpoint {shape}: step {spread(without, 3)} s, lost {spread(lost, 3)} s; of 50 steps {spread(cost, 4)}",
        flush=True,
    )
    return {"lost_s": lost, "step_s": without, "cost_of_50": cost}


def save_beside(ours: Ours, saver: ThreadPoolExecutor, store: Any, run: TrainRun, folder: Path) -> Future[str]:
    """Begin a checkpoint as the trainer does."""
    taken = checkpoint.snapshot(ours.model, ours.parameters, ours.steps[4].optimizer)
    ours.steps[4].hold = taken.ready
    return saver.submit(checkpoint.save, store, run, taken, {"step": ours.steps[4].step}, {}, (), folder)


def seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def gate() -> dict[str, Any]:
    from tests.bench import train_gate  # it needs Triton

    kernels = train_gate.check_kernels()
    bad = {name: e for name, e in kernels.items() if not e < 8e-3}
    print(f"kernels: worst {max(kernels.values()):.1e} of {len(kernels)}; bad: {bad}")
    worst, mean, losses = train_gate.check_loss()
    print(
        f"loss of 200 steps {losses[0]:.3f} -> {losses[-1]:.3f}, ours bf16 against float32: max {worst:.1e}, mean {mean:.1e}"
    )
    untouched, counts = train_gate.check_apart()
    print(f"another document's tokens leave logits untouched: {untouched}; its own change them: {counts}", flush=True)
    return {"kernels": kernels, "loss_max": worst, "loss_mean": mean, "apart": untouched and counts}


def sections() -> dict[str, Callable[[], Any]]:
    if not torch.cuda.is_available():
        plain: dict[str, Any] = {"attention": "sdpa", "use_liger_kernel": False, "use_cpu": True, "bf16": False}
        return {
            "cpu135m": lambda: versus(
                "135M", False, (1,), per_window=2, warm=2, dtype=torch.float32, gradient_checkpointing=False, **plain
            )
        }
    defaults: dict[str, Any] = {
        "packing": False,
        "use_liger_kernel": False,
        "gradient_checkpointing": True,
        "attention": "sdpa",
    }
    return {
        "lora7b": lambda: versus("7B", False, (4, 8)),
        "qlora7b": lambda: versus("7B", True, (4, 8)),
        "gate": gate,
        "lora1.8b": lambda: versus("1.8B", False, (4, 8)),
        "defaults7b": lambda: versus("7B", True, (1,), warm=4, **defaults),
        "checkpoint": checkpoints,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="sections, with commas between")
    parser.add_argument("--json", default="", help="a file for all numbers")
    options = parser.parse_args()
    for name, section in sections().items():
        if not options.only or name in options.only.split(","):
            try:
                NUMBERS[name] = section()
            except Exception:
                traceback.print_exc()
            if options.json:
                Path(options.json).write_text(json.dumps(NUMBERS, default=str))


if __name__ == "__main__":
    main()
