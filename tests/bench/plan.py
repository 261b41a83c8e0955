"""python -m tests.bench.plan [SHAPE …]: planned peak memory beside what real training workers came to hold.

On a GPU torch's own peak of allocated bytes counts, without CUDA's context; on a CPU the process's peak resident size. The
shapes are those of train_shapes.py, `small` if none is named.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.finetune import plan
from services.finetune.config import ArtifactRef, RunConfig, TrainRun, override, to_json
from services.finetune.plan import Device
from services.finetune.progress import attempt_key, dump, raise_fence, read_segments, run_uri
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import File, Manifest, publish, publish_directory
from services.training.planning import Planned, Planner
from tests.bench.train_shapes import SHAPES, random_causal
from tests.tiny import tiny_tokenizer

META = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "generation": {"eos_token_id": [2]}}
GPU = torch.cuda.is_available()
CASES: tuple[Mapping[str, Any], ...] = (
    {"lora.rank": 64, "lora.dropout": 0.1, "data.max_length": 512},
    {"lora.rank": 8, "lora.dropout": 0.0, "data.max_length": 256, "schedule.batch_size": 2, "schedule.accumulate": 2},
)
GPU_CASES: tuple[Mapping[str, Any], ...] = (
    {"schedule.batch_size": 4, "data.max_length": 2048},
    {"schedule.batch_size": 4, "data.max_length": 2048, "method": "qlora", "quant.bits": 4},
    {"schedule.batch_size": 1, "data.max_length": 2048, "method": "qlora", "quant.bits": 4},
)
BASE: Mapping[str, Any] = {
    "method": "lora",
    "quant.bits": 0,
    "model.dtype": "bfloat16" if GPU else "float32",
    "optim.name": "adamw",
    "schedule.accumulate": 1,
    "schedule.max_steps": 3,
    "report.log_every": 1,
}


@dataclass(frozen=True, slots=True)
class Compared:
    planned: Planned
    measured: int

    @property
    def ratio(self) -> float:
        """Planned by measured; CUDA's context is in neither."""
        assert self.planned.memory is not None
        left_out = self.planned.memory.runtime if GPU else 0
        return (self.planned.memory.peak - left_out) / self.measured


def model(store: Store, shape: str, folder: Path) -> str:
    random_causal(shape, torch.bfloat16).save_pretrained(folder)
    return publish_directory(store, "base", tiny_tokenizer(folder), meta=META)


def dataset(store: Store, length: int, rows: int = 16) -> str:
    """Rows that fill a block each: the tiny tokenizer has a token for each byte."""
    lines = "".join(json.dumps({"instruction": f"{n:8}", "output": "y" * (length - 64)}) + "\n" for n in range(rows))
    blob = store.put_blob(lines.encode())
    files = (File("a.jsonl", blob.digest, blob.size),)
    return publish(store, Manifest("dataset", files, (), {"format": "alpaca", "rows": rows}))


def device() -> Device:
    if not GPU:
        return Device("cpu", 1 << 40)
    return Device("", torch.cuda.get_device_properties(0).total_memory)


def compare(store: Store, base: str, changes: Mapping[str, Any], key: str) -> Compared:
    """Plan a run, run it, and read what it held."""
    config = override(RunConfig(), {**BASE, **changes})
    data = dataset(store, config.data.max_length, 8 * config.schedule.batch_size)
    run = TrainRun(
        job="bench",
        config=config,
        base=ArtifactRef(name="base", digest=base),
        datasets=(ArtifactRef(name="data", digest=data),),
    )
    raise_fence(store, key, 1)
    store.put(f"{attempt_key(key, 1)}/run.json", dump(to_json(run)))
    subprocess.run([sys.executable, "-m", "services.finetune", "train", run_uri(store.uri, key, 1)], check=True)
    events = [e for _, segment in read_segments(store, key, 1, -1) for e in segment]
    measured = [e["values"]["peak_memory_bytes"] for e in events if e["type"] == "metric"][-1]
    # Planned afterwards: the worker put the prepared data on the shelf, so the figures are exact.
    return Compared(Planner(store, device()).plan(run, None, ()), int(measured))


def main() -> None:
    shapes = sys.argv[1:] or ["small"]
    print("| shape | what | planned GiB | measured GiB | ratio | parts, GiB |\n|---|---|---|---|---|---|")
    for shape in shapes:
        if shape not in SHAPES:
            raise SystemExit(f"no shape {shape}; there are {', '.join(SHAPES)}")
        with tempfile.TemporaryDirectory() as folder:
            store = open_store((Path(folder) / "store").as_uri())
            base = model(store, shape, Path(folder) / "model")
            for n, changes in enumerate(GPU_CASES if GPU else CASES):
                one = compare(store, base, changes, f"jobs/plan-{n}")
                held = one.planned.memory
                assert held is not None
                parts = " ".join(f"{k} {v / plan.GIB:.2f}" for k, v in to_json(held).items() if v)
                what = ", ".join(f"{k.partition('.')[2] or k} {v}" for k, v in changes.items())
                sizes = f"{held.peak / plan.GIB:.2f} | {one.measured / plan.GIB:.2f}"
                print(f"| {shape} | {what} | {sizes} | {one.ratio:.3f} | {parts} |", flush=True)


if __name__ == "__main__":
    main()
