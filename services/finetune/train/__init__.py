"""Training: `train` is the whole of a training worker's work; the loop is in loop.py."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from services.finetune.config import TrainRun
from services.finetune.progress import Attempt


def train(run: TrainRun, attempt: Attempt, stop: threading.Event, workdir: Path) -> dict[str, Any]:
    """Run an order to its end; {"checkpoint": digest, "step": n} of the last checkpoint, or of the best if that is asked
    for, and as "message" why it ended early, if it did.

    Raises Cancelled (STOPPED) after saving when `stop` is set, and every QuartetError that the data, the config or the
    model deserve.
    """
    from services.finetune.train.loop import Trainer

    return Trainer(run, attempt, stop, workdir).run()
