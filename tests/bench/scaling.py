"""`make bench-scaling`: the real trainer in 1, 2, 4, 8 processes, as whole copies and by ZeRO, beside one process.

Each line is a whole job: worker, ranks, store, checkpoint at the end. On GPUs 7B's shape with random weights, one process a
GPU; without one a small shape, two processes at most, to see that it works: its numbers mean nothing. Every process has as
many tokens a step whatever their number (weak scaling), so the efficiency is tokens/s over processes times those of one.
`--shape NAME`, `--steps N`, `--ranks 1,2` and `--json FILE` change that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from services.finetune.config import ArtifactRef, RunConfig, TrainRun, override, to_json
from services.finetune.progress import attempt_key, dump, raise_fence, read_fault, read_outcome, read_segments, run_uri
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import File, Manifest, publish, publish_directory
from tests.bench.train_shapes import SHAPES, random_causal
from tests.tiny import tiny_tokenizer

WARM = 4
"""Steps that are not counted: kernels are chosen, the allocator finds its sizes."""
WAYS: tuple[tuple[str, str, str, str], ...] = (
    ("LoRA, copies", "lora", "", "all"),
    ("LoRA, ZeRO-3", "lora", "deepspeed_zero3", "many"),
    ("QLoRA, copies", "qlora", "", "all"),
    ("QLoRA, ZeRO-2", "qlora", "deepspeed_zero2", "two"),
    ("QLoRA, ZeRO-3", "qlora", "deepspeed_zero3", "two"),
)
"""What it is called, method, preset, and in how many processes: any, two or more, two."""


def put_base(store: Store, shape: str, folder: Path) -> str:
    model = random_causal(shape, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tiny_tokenizer(folder)
    meta = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "generation": {"eos_token_id": [2]}}
    return publish_directory(store, "base", folder, meta=meta)


def put_rows(store: Store, count: int) -> str:
    """Rows of some 400 tokens each, by a tokenizer of bytes."""
    rows = ({"instruction": f"say {n}", "output": f"{n} it is. " * 40} for n in range(count))
    blob = store.put_blob("".join(json.dumps(row) + "\n" for row in rows).encode())
    files = (File("a.jsonl", blob.digest, blob.size),)
    return publish(store, Manifest("dataset", files, (), {"format": "alpaca", "rows": count}))


def job(store: Store, key: str, base: str, data: str, changes: dict[str, Any]) -> list[float]:
    """Run a whole job; tokens/s of each step after the first WARM."""
    run = TrainRun(
        job=key,
        config=override(RunConfig(), changes),
        base=ArtifactRef(name="base", digest=base),
        datasets=(ArtifactRef(name="rows", digest=data),),
    )
    raise_fence(store, key, 1)
    store.put(f"{attempt_key(key, 1)}/run.json", dump(to_json(run)))
    command = [sys.executable, "-m", "services.finetune", "train", run_uri(store.uri, key, 1)]
    subprocess.run(command, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}, check=False)
    ended = read_outcome(store, key)
    if ended is None or ended[1].state != "SUCCEEDED":
        raise RuntimeError(f"{key}: {ended[1].error if ended else read_fault(store, key, 1)}")
    events = [e for _, segment in read_segments(store, key, 1, -1) for e in segment]
    return [e["values"]["tokens_per_s"] for e in events if e["type"] == "metric" and e["step"] > WARM]


def main() -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="7B" if gpus else "small", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=20 if gpus else 6)
    parser.add_argument("--ranks", default=",".join(str(n) for n in (1, 2, 4, 8) if n <= (gpus or 2)))
    parser.add_argument("--json", default="", help="a file for all numbers")
    options = parser.parse_args()
    counts = [int(n) for n in options.ranks.split(",")]
    blocks = 4 if gpus else 1
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        store = open_store(f"file://{home}/store")
        base = put_base(store, options.shape, Path(home) / "base")
        # Five rows or more fill a block.
        data = put_rows(store, 6 * blocks * max(counts) * (options.steps + 1))
        print(f"{options.shape}, {gpus or 'no'} GPUs, {blocks} blocks of 2048 tokens a process and step", flush=True)
        for name, method, preset, where in WAYS:
            for count in counts:
                if (where == "many" and count < 2) or (where == "two" and count != 2):
                    continue
                changes = {
                    "method": method,
                    "quant.bits": 4 if method == "qlora" else 0,
                    "optim.name": "adamw",
                    "schedule.batch_size": blocks,
                    "schedule.accumulate": 1,
                    "schedule.ranks": count,
                    "schedule.max_steps": options.steps,
                    "report.log_every": 1,
                    "parallel.processes": count,
                    "parallel.deepspeed": preset,
                }
                rates = job(store, f"jobs/{method}-{preset or 'copies'}-{count}", base, data, changes)
                numbers[f"{name}, {count}"] = rates
                median = statistics.median(rates)
                one = numbers.get(f"{name.partition(',')[0]}, copies, 1")
                part = f", {median / statistics.median(one) / count:.2f} of {count} times one" if one else ""
                print(
                    f"{name:14} {count} processes: {median:,.0f} tokens/s ({min(rates):,.0f}-{max(rates):,.0f}){part}",
                    flush=True,
                )
                if options.json:
                    Path(options.json).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
