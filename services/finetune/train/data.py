"""From dataset revisions to blocks of tokens: what an earlier job prepared of the same, or prepared now for later ones."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

from services.finetune.config import PrepareRun, TrainRun
from services.finetune.packing import Blocks
from services.finetune.prepare import MADE, obtain
from services.finetune.prepare.certificate import Certificate
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import load, materialise
from services.finetune.templates import Template


def prepare(
    run: TrainRun,
    template: Template,
    certificate: Certificate,
    model_dir: Path,
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
) -> Blocks:
    """The blocks of all datasets of a run, memory-mapped. Errors as services.finetune.prepare.prepare."""
    order = PrepareRun(
        job=run.job,
        model=run.base,
        datasets=run.datasets,
        data=dataclasses.replace(run.config.data, template=template.name),
        seed=run.config.schedule.seed,
    )
    digest = obtain(order, certificate, model_dir, attempt, stop, workdir)
    folder = workdir / MADE
    if not folder.exists():
        materialise(attempt.store, load(attempt.store, digest), folder)
    return Blocks.open(folder)
