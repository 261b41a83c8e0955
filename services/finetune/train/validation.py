"""The loss over rows that are not learned from, and what follows from it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.finetune.packing import Blocks
from services.finetune.train.engine import Engine


@dataclass(slots=True)
class Looks:
    """What validation has said so far. It is saved with each checkpoint, so that a resumed run ends where it would have."""

    step: int = -1
    """After which the last look was."""
    loss: float | None = None
    """What it saw."""
    best: float | None = None
    bar: float | None = None
    """What a loss must be below by min_delta."""
    stale: int = 0
    """Looks in a row that were not."""

    def add(self, step: int, loss: float, min_delta: float) -> bool:
        """Take in a look; whether its loss is the least so far."""
        self.step, self.loss = step, loss
        best = self.best is None or loss < self.best
        if best:
            self.best = loss
        if self.bar is None or loss < self.bar - min_delta:
            self.bar, self.stale = loss, 0
        else:
            self.stale += 1
        return best


def mean_loss(engine: Engine, sets: Sequence[Blocks], batch_size: int, stop: threading.Event) -> float | None:
    """Cross entropy for each learned token of all blocks, without dropout; None if `stop` was set meanwhile.

    Micro-batches are summed in float64 on the host, so their size changes the result by rounding only.
    """
    total = 0.0
    for blocks in sets:
        for at in range(0, len(blocks), batch_size):
            if stop.is_set():
                return None
            total += float(engine.look(blocks, np.arange(at, min(at + batch_size, len(blocks)))))
    return total / sum(blocks.learned for blocks in sets)
