"""python -m tests.bench.plan [SHAPE[:CASE,…] …]: planned peak memory beside what real training workers came to hold.

On a GPU torch's own peak of allocated bytes counts, without CUDA's context; on a CPU the process's peak resident size. With
several GPUs it is the first rank's. Shapes are those of train_shapes.py and, for models that see, plan_shapes.py; `small` if
none is named.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.finetune.config import to_json
from services.finetune.devices import GIB, Device
from services.finetune.store import Store, open_store
from services.training.planning import Planned, Planner
from tests.bench.jobs import GPU, Ended, job, order, put_base, put_rows
from tests.bench.plan_shapes import SEEING, SEEING_LENGTH, put_images, put_seeing
from tests.bench.train_shapes import SHAPES

FOUR: Mapping[str, Any] = {"method": "qlora", "quant.bits": 4}
FULL: Mapping[str, Any] = {"method": "full"}
PROJECTOR: Mapping[str, Any] = {"lora.modules_to_save": ["multi_modal_projector"]}
TOWER: Mapping[str, Any] = {"lora.targets": ["all-linear", "model.vision_tower.*"], **PROJECTOR}
CASES: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "lora4": {"schedule.batch_size": 4},
    "wide": {"lora.rank": 64, "lora.dropout": 0.0, "schedule.batch_size": 2, "schedule.accumulate": 2},
    "qlora": FOUR,
    "qlora4": {**FOUR, "schedule.batch_size": 4},
    "fp4": {**FOUR, "quant.kind": "fp4"},
    "int8": {"method": "int8_lora", "quant.bits": 8},
    "dora": {"lora.use_dora": True},
    "fixed": {"schedule.deterministic": True},
    "kept": {"schedule.deterministic": True, "model.gradient_checkpointing": "none"},
    "saved": {"lora.modules_to_save": ["lm_head"]},
    "adam8": {"optim.name": "adamw_8bit"},
    "full": FULL,
    "full8": {**FULL, "optim.name": "adamw_8bit"},
    "fullkept": {**FULL, "model.gradient_checkpointing": "none"},
    "fullsgd": {**FULL, "optim.name": "sgd"},
    "fulllion": {**FULL, "optim.name": "lion"},
    "fulladafactor": {**FULL, "optim.name": "adafactor"},
    "offload": {**FOUR, "parallel.deepspeed": "deepspeed_zero2_offload"},
    "offload3": {"parallel.deepspeed": "deepspeed_zero3_offload"},
    "zero2": {"parallel.deepspeed": "deepspeed_zero2"},
    "qzero2": {**FOUR, "parallel.deepspeed": "deepspeed_zero2"},
    "zero3": {"parallel.deepspeed": "deepspeed_zero3"},
    "qzero3": {**FOUR, "parallel.deepspeed": "deepspeed_zero3"},
    "lora4zero3": {"schedule.batch_size": 4, "parallel.deepspeed": "deepspeed_zero3"},
    "qlora4zero3": {**FOUR, "schedule.batch_size": 4, "parallel.deepspeed": "deepspeed_zero3"},
    "projector": {"lora.targets": [], **PROJECTOR},
    "frozen": PROJECTOR,
    "tower": TOWER,
    "tower4": {**TOWER, "schedule.batch_size": 4},
    "pictures": {**TOWER, "schedule.batch_size": 8, "data.max_length": 320},
    "kept_whole": {**TOWER, "schedule.batch_size": 8, "data.max_length": 320, "lora.dropout": 0.0},
    "fullzero1": {**FULL, "parallel.deepspeed": "deepspeed_zero1"},
    "fullzero2": {**FULL, "parallel.deepspeed": "deepspeed_zero2"},
    "fullzero3": {**FULL, "parallel.deepspeed": "deepspeed_zero3"},
}
"""Zero stages without offload deal nothing out in one process: they need --ranks. What trains a tower or a projector needs a
shape that sees."""
BASE: Mapping[str, Any] = {
    "method": "lora",
    "quant.bits": 0,
    "model.dtype": "bfloat16" if GPU else "float32",
    "optim.name": "adamw",
    "data.max_length": 2048 if GPU else 256,
    "schedule.accumulate": 1,
    "schedule.max_steps": 3,
    "report.log_every": 1,
}


@dataclass(frozen=True, slots=True)
class Compared:
    planned: Planned
    ended: Ended

    @property
    def measured(self) -> int:
        return int(self.ended.values("peak_memory_bytes")[-1])

    @property
    def ratio(self) -> float:
        """Planned by measured; CUDA's context is in neither. 0 where there is no plan."""
        if self.planned.memory is None:
            return 0.0
        left_out = self.planned.memory.runtime if GPU else 0
        return (self.planned.memory.peak - left_out) / self.measured


def device() -> Device:
    if not GPU:
        return Device("cpu", 1 << 40)
    return Device("", torch.cuda.get_device_properties(0).total_memory)


def compare(store: Store, base: str, changes: Mapping[str, Any], key: str, shape: str = "") -> Compared:
    """Run a job, plan it, and read what it held."""
    asked = {**BASE, **({"data.max_length": SEEING_LENGTH} if shape in SEEING else {}), **changes}
    blocks = asked.get("schedule.batch_size", 1) * asked.get("schedule.ranks", 1)
    length = asked["data.max_length"]
    data = (
        put_images(store, shape, max(80, 8 * blocks), length)
        if shape in SEEING
        else put_rows(store, 8 * blocks, length)
    )
    run = order(base, data, asked)
    ended = job(store, run, key)
    # Planned afterwards: the worker put the prepared data on the shelf, so the figures are exact.
    return Compared(Planner(store, device()).plan(run, None, ()), ended)


def told(shape: str, case: str, one: Compared) -> str:
    memory = one.planned.memory
    parts = " ".join(f"{k} {v / GIB:.2f}" for k, v in to_json(memory).items() if v) if memory else ""
    peak = f"{memory.peak / GIB:.2f}" if memory else "; ".join(one.planned.assumptions)
    return f"| {shape} | {case} | {peak} | {one.measured / GIB:.2f} | {one.ratio:.3f} | {parts} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["small:lora,wide"])
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument("--store", default="", help="a folder that keeps bases for later benchmarks")
    parser.add_argument("--json", default="", help="a file for all numbers")
    options = parser.parse_args()
    numbers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as home:
        store = open_store(Path(options.store or f"{home}/store").absolute().as_uri())
        print(
            "| shape | what | planned GiB | measured GiB | ratio | parts, GiB |\n|---|---|---|---|---|---|", flush=True
        )
        for shape, _, cases in (text.partition(":") for text in options.shapes):
            if shape not in (*SHAPES, *SEEING):
                raise SystemExit(f"no shape {shape}; there are {', '.join((*SHAPES, *SEEING))}")
            base = put_seeing(store, shape) if shape in SEEING else put_base(store, shape)
            for case in cases.split(",") if cases else ("lora", "wide"):
                changes = {**CASES[case], "parallel.processes": options.ranks, "schedule.ranks": options.ranks}
                try:
                    one = compare(store, base, changes, f"jobs/plan-{shape}-{case}-{options.ranks}", shape)
                except RuntimeError as error:
                    print(f"| {shape} | {case} | {error} |", flush=True)
                    continue
                print(told(shape, case, one), flush=True)
                numbers.append({"shape": shape, "case": case, "ranks": options.ranks, "measured": one.measured})
                numbers[-1] |= {"planned": to_json(one.planned.memory), "logs": one.ended.logs}
                if options.json:
                    Path(options.json).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
