"""A training job's plan, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from quartet.training.v1 import training_pb2

from services.client.show import plain
from services.common import wire
from services.finetune.errors import ResourceExhausted

GIB = 2**30
PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "runtime", "checkpoint")


def lines(job: training_pb2.TrainingJob) -> Iterator[str]:
    """The plan, and in words what does not fit and the change that does."""
    plan: dict[str, Any] = plain(job.plan)
    data, memory = plan.get("data"), plan.get("memory")
    if data:
        about = "about " if data.get("sampled_rows") else ""
        yield (
            f"data    {data['rows']:,} rows, {about}{data['samples']:,} samples in {about}{data['blocks']:,} blocks of "
            f"{data['block_length']:,} tokens" + (f" with {data['images']:,} images" if data.get("images") else "")
        )
        yield (
            f"        {about}{data['tokens']:,} tokens an epoch, {about}{data.get('learned_tokens', 0):,} learned; "
            f"{data.get('truncated_rows', 0):,} rows cut, {data.get('dropped_rows', 0):,} without anything to learn"
        )
    yield f"steps   {plan.get('steps', 0):,} ({plan.get('steps_per_epoch', 0):,} an epoch)"
    if memory:
        parts = [(part, memory[part]) for part in PARTS if memory.get(part)]
        how = f"{plan.get('dtype', '')}, {plan.get('engine', '')}"
        yield f"memory  {_gib(memory['peak'])} at the peak of one process ({how})"
        yield "        " + ", ".join(f"{part} {_gib(size)}" for part, size in parts)
    if "least_s" in plan:
        yield f"time    {_time(plan['least_s'])} to {_time(plan['most_s'])}"
    yield f"fits    {_verdict(plan)}"
    for change in job.plan.changes:
        options = " ".join(f"{key}={value}" for key, value in sorted(wire.from_struct(change.overrides).items()))
        how = f"--cfg-options {options}" if options else f"--gpu {change.device}"
        yield f"        {change.message} ({_gib(change.peak)}): {how}"
    for told in plan.get("assumptions", ()):
        yield f"note    {told}"


def check_fits(job: training_pb2.TrainingJob) -> None:
    """ResourceExhausted (DOES_NOT_FIT) if the plan says so."""
    if job.plan.fits == training_pb2.Plan.NO:
        raise ResourceExhausted(f"the run does not fit: {_verdict(plain(job.plan))}", reason="DOES_NOT_FIT")


def _verdict(plan: dict[str, Any]) -> str:
    device, memory = plan.get("device", {}), plan.get("memory")
    where = f"{_gib(device.get('memory', 0))} of {device.get('kind') or 'the GPU'}"
    if plan["fits"] == "UNKNOWN" or memory is None:
        return "unknown"
    if plan["fits"] == "YES":
        return f"yes, in the {where}"
    largest = max(PARTS, key=lambda part: int(memory.get(part, 0)))
    short = memory["peak"] - device["memory"]
    return f"no: {_gib(short)} more than the {where}; most of it is {largest}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size < 10 * GIB else f"{size / GIB:.1f} GiB"


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
