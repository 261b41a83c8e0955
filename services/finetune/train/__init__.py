"""Training: `train` is the whole of a training worker's work; the loop is in loop.py, several processes in ranks.py."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

from services.finetune.orders import TrainRun
from services.finetune.progress import Attempt, run_uri
from services.finetune.train import ranks


def train(run: TrainRun, attempt: Attempt, stop: threading.Event, workdir: Path) -> dict[str, Any]:
    """Run an order to its end; {"checkpoint": digest, "step": n} of the last checkpoint, or of the best if that is asked
    for, and as "message" why it ended early, if it did.

    Where several processes are wanted this one starts and watches them; see services.finetune.train.ranks. Raises Cancelled
    (STOPPED) after saving when `stop` is set, and every QuartetError that the data, the config or the
    model deserve.
    """
    if ranks.place(os.environ) is None:
        local = ranks.wanted(run.config.parallel, os.environ)
        if local * run.config.parallel.nodes > 1:
            from services.finetune.train.leader import Leader

            uri = run_uri(attempt.store.uri, attempt.job_key, attempt.number)
            return Leader(attempt, stop, local, [sys.executable, "-m", "services.finetune", "train", uri]).run()
    from services.finetune.train.loop import Trainer
    from services.finetune.train.parallel import join

    with join(attempt) as group:
        return Trainer(run, attempt, stop, workdir, group).run()
