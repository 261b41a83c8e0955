"""`make bench-scaling`: the real trainer in 1, 2, 4, 8 processes, as whole copies and by ZeRO, beside one process.

Each line is a whole job: worker, ranks, store, checkpoint at the end. First `agree`: at one global batch, losses of many
ranks beside one's, and a checkpoint of many taken up by one. Then `speed`: on GPUs 7B's shape with random weights, one
process a GPU; without one a small shape, two processes at most, to see that it works: its numbers mean nothing. Every
process has as many tokens a step whatever their number (weak scaling), so it is tokens/s beside those of one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from services.finetune.progress import checkpoints
from services.finetune.store import Store, open_store
from tests.bench.jobs import GPU, Ended, job, order, put_base, put_rows, rates
from tests.bench.train_shapes import SHAPES

WARM = 4
"""Steps that are not counted: kernels are chosen, the allocator finds its sizes."""
AGREED = 50
"""Steps whose losses are held beside one process's; goal 1e-3."""


@dataclass(frozen=True, slots=True)
class Way:
    method: str
    stage: str
    """Of ZeRO; empty are whole copies."""

    @property
    def name(self) -> str:
        return f"{'QLoRA' if self.method == 'qlora' else 'LoRA'}, {'ZeRO-' + self.stage if self.stage else 'copies'}"

    def changes(self, processes: int, ranks: int) -> dict[str, Any]:
        return {
            "method": self.method,
            "quant.bits": 4 if self.method == "qlora" else 0,
            "optim.name": "adamw",
            "schedule.accumulate": 1,
            "schedule.ranks": ranks,
            "report.log_every": 1,
            "parallel.processes": processes,
            "parallel.deepspeed": f"deepspeed_zero{self.stage}" if self.stage else "",
        }


WAYS = tuple(Way(method, stage) for method in ("lora", "qlora") for stage in ("", "2", "3"))


def speed(store: Store, options: argparse.Namespace, counts: list[int]) -> dict[str, Any]:
    """Tokens/s of each way in each number of processes."""
    blocks, numbers = 4 if GPU else 1, dict[str, Any]()
    base = put_base(store, options.shape)
    # Five rows or more fill a block.
    data = put_rows(store, 6 * blocks * max(counts) * (options.steps + 1))
    print(f"{options.shape}, {blocks} blocks of 2048 tokens a process and step", flush=True)
    for way in WAYS:
        if options.ways and f"{way.method}{way.stage}" not in options.ways.split(","):
            continue
        # LoRA keeps to the least stage that fits, so its ZeRO-2 is nobody's choice.
        for count in counts:
            if (count < 2 and way.stage) or (way.method, way.stage) == ("lora", "2"):
                continue
            changes = {"schedule.batch_size": blocks, "schedule.max_steps": options.steps}
            run = order(base, data, {**way.changes(count, count), **changes})
            ended = job(store, run, f"jobs/{way.method}{way.stage}-{count}")
            pace = rates(store, ended, WARM)
            numbers[f"{way.name}, {count}"] = pace
            median, one = statistics.median(pace), numbers.get(f"{way.name.partition(',')[0]}, copies, 1")
            part = f", {median / statistics.median(one):.2f} times one" if one else ""
            held = next((text for text in ended.logs if text.startswith("peak memory")), "")
            print(
                f"{way.name:14} {count} processes: {median:,.0f} tokens/s ({min(pace):,.0f}-{max(pace):,.0f})"
                f"{part}; {held}",
                flush=True,
            )
    return numbers


def agree(store: Store, ranks: int) -> dict[str, Any]:
    """Largest relative difference of the losses of `ranks` processes from one's, by way; all read the same blocks."""
    base, data = put_base(store, "small"), put_rows(store, 400)
    length = 2048 if GPU else 128
    always = {
        "lora.dropout": 0.0,
        "schedule.kind": "constant",
        "schedule.max_steps": AGREED,
        "optim.lr": 1e-3,
        "data.max_length": length,
        "report.checkpoint_every": AGREED // 2,
    }

    def losses(way: Way, processes: int, name: str, resume: str = "") -> Ended:
        changes = {**way.changes(processes, ranks), **always}
        return job(store, order(base, data, changes, resume), f"jobs/agree-{way.method}{way.stage}-{name}")

    def many(way: Way) -> tuple[str, Ended]:
        return f"{way.name}, {ranks} processes", losses(way, ranks, "many")

    def moved(way: Way) -> tuple[str, Ended]:
        half = checkpoints(store, f"jobs/agree-{way.method}{way.stage}-many", 2)[AGREED // 2]["digest"]
        return f"{way.name}, {ranks} processes, then 1", losses(Way(way.method, ""), 1, f"from{way.stage}", half)

    numbers: dict[str, Any] = {}
    ways = [way for way in WAYS if (way.method, way.stage) != ("lora", "2")]
    with ThreadPoolExecutor(4 if GPU else 1) as pool:
        ones = {way.method: pool.submit(losses, way, 1, "one") for way in ways if not way.stage}
        asked = [(way, pool.submit(many, way)) for way in ways]
        wait([future for _, future in asked])
        for way, future in asked + [(way, pool.submit(moved, way)) for way in ways if way.stage == "3"]:
            if error := future.exception():
                print(f"{way.name}: {error}", flush=True)
                continue
            name, ended = future.result()
            theirs = {e["step"]: e["values"]["loss"] for e in ones[way.method].result().metrics}
            apart = {e["step"]: abs(e["values"]["loss"] / theirs[e["step"]] - 1) for e in ended.metrics}
            worst = max(apart, key=apart.__getitem__)
            print(f"{name}: {len(apart)} losses within {apart[worst]:.1e} of one's (step {worst})", flush=True)
            numbers[name] = apart
    return numbers


def main() -> None:
    gpus = torch.cuda.device_count() if GPU else 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="agree,speed")
    parser.add_argument("--ways", default="", help="of speed, such as lora,qlora3; all if left out")
    parser.add_argument("--shape", default="7B" if gpus else "small", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=20 if gpus else 6)
    parser.add_argument("--ranks", default=",".join(str(n) for n in (1, 2, 4, 8) if n <= (gpus or 2)))
    parser.add_argument("--store", default="", help="a folder that keeps bases for later benchmarks")
    parser.add_argument("--json", default="", help="a file for all numbers")
    options = parser.parse_args()
    counts = [int(n) for n in options.ranks.split(",")]
    print(f"{gpus or 'no'} GPUs", flush=True)
    with tempfile.TemporaryDirectory() as home:
        store = open_store(Path(options.store or f"{home}/store").absolute().as_uri())
        numbers: dict[str, Any] = {}
        if "agree" in options.only and max(counts) > 1:
            numbers["agree"] = agree(store, max(counts))
        if "speed" in options.only:
            numbers["speed"] = speed(store, options, counts)
    if options.json:
        Path(options.json).write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
