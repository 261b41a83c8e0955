"""A rank of a test as together.py, where the fused path computes on a CPU and deals out what asks for ZeRO-3.

Orders named in SHORT run out of memory. ``python -m tests.finetune.train.dealing train URI`` is a whole worker instead, in
which the step after step HOLD of its environment waits until it is asked to stop.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from services.finetune import __main__ as worker
from services.finetune.config import RunConfig
from services.finetune.errors import ResourceExhausted
from services.finetune.progress import Attempt
from services.finetune.train import engine, leader, memory, ops_torch, stage
from services.finetune.train.fused import Fused
from services.finetune.train.parallel import Group
from services.finetune.train.step import Stepper
from tests.finetune.train import together


def fused_here(patch: pytest.MonkeyPatch) -> None:
    """Let the fused path be for a CPU too, by what its operations mean."""

    def deals(folder: Path, config: RunConfig, group: Group, dtype: torch.dtype) -> bool:
        return group.world > 1 and config.parallel.deepspeed == "deepspeed_zero3"

    for module in (engine, stage):
        patch.setattr(module, "unfused", lambda *_: "")
        patch.setattr(module, "operations", lambda: ops_torch)
    patch.setattr(stage, "deals", deals)
    patch.setattr(memory, "free_bytes", lambda device: 1 << 40)


SHORT: dict[str, tuple[type[Any], str, int, int]] = {
    "short_before": (Fused, "embed", 1, 0),
    "short_forward": (Fused, "_forward", 1, 1),
    "short_loss": (Fused, "_loss", 0, 0),
    "short_backward": (Fused, "_backward", 1, 1),
    "short_always": (Fused, "_backward", 0, 0),
    "short_alone": (Fused, "_forward", 1, 1),
}
"""By order: what runs out of memory, on which rank, in which of its calls of a micro-step."""


def run_out(patch: pytest.MonkeyPatch, name: str, rank: int) -> None:
    """From the second step on, until less is computed at once; `short_always` goes on."""
    at = {"step": 0, "spared": 0, "calls": 0}
    owner, method, which, call = SHORT[name]
    real, gradients, backprop = getattr(owner, method), Stepper._gradients, engine.Handmade.backprop

    def fail(self: Any, *given: Any, **more: Any) -> Any:
        at["calls"] += 1
        spared = at["spared"] and name != "short_always"
        if rank == which and at["step"] and not spared and at["calls"] == call + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *given, **more)

    def step(self: Stepper, *given: Any) -> Any:
        at.update(step=self.step, spared=self.spared)
        return gradients(self, *given)

    def begin(self: engine.Handmade, *given: Any) -> Any:
        at["calls"] = 0
        return backprop(self, *given)

    patch.setattr(owner, method, fail)
    patch.setattr(Stepper, "_gradients", step)
    patch.setattr(engine.Handmade, "backprop", begin)


def go(store: Any, name: str, data: Any, group: Group, workdir: Path) -> list[dict[str, Any]]:
    """As together's; an order that all ranks give up says with what."""
    with pytest.MonkeyPatch.context() as patch:
        if name in SHORT:
            run_out(patch, name, group.rank)
        try:
            return real_go(store, name, data, group, workdir)
        except ResourceExhausted as error:
            return [{"type": "error", **error.to_json()}]


def hold(patch: pytest.MonkeyPatch, at: int) -> None:
    real = Stepper.take

    def take(self: Stepper) -> None:
        if self.step == at:
            self.stop.wait()
        real(self)

    patch.setattr(Stepper, "take", take)


def lead(attempt: Attempt, stop: threading.Event, local: int, command: Sequence[str]) -> leader.Leader:
    """Its ranks are workers like this one."""
    return real_leader(attempt, stop, local, [command[0], "-m", "tests.finetune.train.dealing", *command[3:]])


real_go, real_leader = together.go, leader.Leader

if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        fused_here(patch)
        if len(sys.argv) > 2:
            patch.setattr(leader, "Leader", lead)
            hold(patch, int(os.environ.get("HOLD", "-1")))
            sys.exit(worker.main())
        patch.setattr(together, "go", go)
        together.main()
