"""python -m tests.bench.resume: a job cut by kill -9 beside the same one left alone, on this machine's device.

With `schedule.deterministic` both end with the same adapter to the last bit; by default a GPU's sums have no fixed order,
and the report says at which step the second try parted from the first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from services.finetune.orders import TrainRun
from services.finetune.progress import attempt_key, checkpoints
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import load
from services.finetune.train.steplog import first_difference
from tests.bench.jobs import GPU, Ended, end, job, order, put_base, put_rows, start, steps_of

LENGTH, STEPS, EVERY = (2048, 240, 80) if GPU else (128, 30, 10)


def cut(store: Store, run: TrainRun, key: str) -> Ended:
    """Kill the worker once it went on from its first checkpoint, and start another."""
    worker = start(store, run, key)
    while worker.poll() is None and not checkpoints(store, key, 2):
        time.sleep(0.05)
    # Events reach the store within a second: some of the steps that will be lost must be known.
    segments = f"{attempt_key(key, 1)}/events/"
    known = len(list(store.list(segments)))
    while worker.poll() is None and len(list(store.list(segments))) < known + 2:
        time.sleep(0.05)
    if worker.poll() is not None:
        raise RuntimeError(f"{key} ended before it could be cut")
    worker.kill()
    worker.wait()
    start(store, run, key, 2).wait()
    return end(store, key, 2)


def compare(store: Store, mode: str, changes: dict[str, Any]) -> None:
    data = put_rows(store, 600)
    base = put_base(store, "small")
    run = order(
        base,
        data,
        {
            "method": "lora",
            "quant.bits": 0,
            "optim.name": "adamw",
            "data.max_length": LENGTH,
            "schedule.accumulate": 2,
            "schedule.max_steps": STEPS,
            "report.checkpoint_every": EVERY,
            "report.log_every": 1,
            **changes,
        },
    )
    whole, second = job(store, run, f"jobs/{mode}-whole"), cut(store, run, f"jobs/{mode}-cut")
    adapters = [load(store, e.checkpoint).file("adapter_model.safetensors").digest for e in (whole, second)]
    parted = first_difference(*(steps_of(store, e.checkpoint) for e in (second, whole)))
    print(f"{mode}: {next(text for text in second.logs if text.startswith('gradients by'))}", flush=True)
    print(f"{mode}: {next(text for text in second.logs if text.startswith('going on'))}, {STEPS} in all", flush=True)
    print(f"{mode}: adapters equal {adapters[0] == adapters[1]}; parted from the whole run at: {parted}", flush=True)
    said = [text for text in second.logs if "fixed order" in text and "near" in text]
    print(f"{mode}: the report says: {said[0] if said else 'nothing differs from the first attempt'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="", help="a folder that keeps bases for later benchmarks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(2) as both:
        store = open_store(Path(options.store or f"{home}/store").absolute().as_uri())
        put_base(store, "small")
        modes = {"deterministic": {"schedule.deterministic": True}, "default": {}}
        list(both.map(lambda mode: compare(store, *mode), modes.items()))


if __name__ == "__main__":
    main()
