"""From dataset revisions to blocks of tokens: what an earlier job prepared of the same, or prepared now for later ones."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.orders import ArtifactRef, PrepareRun, TrainRun
from services.finetune.packing import HELD_OUT, Blocks
from services.finetune.prepare import MADE, obtain
from services.finetune.prepare.certificate import Certificate
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import load, materialise
from services.finetune.templates import Template
from services.finetune.train.parallel import Group


@dataclass(frozen=True, slots=True)
class Data:
    """What a run reads: blocks to learn from, and those to look at, which are not learned from."""

    blocks: Blocks
    validation: tuple[Blocks, ...]
    about: Mapping[str, int | float]
    """Counts by name, as the event "dataset" tells them."""


def prepare(
    run: TrainRun,
    template: Template,
    certificate: Certificate,
    model_dir: Path,
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
    group: Group,
) -> Data:
    """All blocks of a run, memory-mapped; one rank prepares them for all. Errors as services.finetune.prepare.prepare."""

    def obtained(datasets: tuple[ArtifactRef, ...], weights: tuple[float, ...], ratio: float, place: Path) -> Any:
        order = PrepareRun(
            job=run.job,
            model=run.base,
            datasets=datasets,
            data=dataclasses.replace(run.config.data, template=template.name, weights=weights),
            seed=run.config.schedule.seed,
            held_out=ratio,
        )
        digest = group.from_first(lambda: obtain(order, certificate, model_dir, attempt, stop, place))
        manifest = load(attempt.store, digest)

        def fetch() -> None:
            if not (place / MADE).exists():
                materialise(attempt.store, manifest, place / MADE)

        group.once(fetch)
        return manifest.meta

    ratio = run.config.validation.ratio
    meta = obtained(run.datasets, run.config.data.weights, ratio, workdir)
    blocks, apart, metas = Blocks.open(workdir / MADE), [], []
    if ratio:
        apart.append(Blocks.open(workdir / MADE, HELD_OUT))
        metas.append(meta["held_out"])
    if run.validation:
        metas.append(obtained(run.validation, (), 0.0, workdir / "validation"))
        apart.append(Blocks.open(workdir / "validation" / MADE))
    return Data(blocks, tuple(apart), _about(meta, metas))


def _about(meta: Mapping[str, Any], validation: list[Mapping[str, Any]]) -> dict[str, int | float]:
    # What was prepared by an earlier version does not tell all.
    counts = {name: meta[name] for name in ("rows", "samples", "blocks", "tokens", "learned", "fill") if name in meta}
    counts |= {"truncated": meta["truncated"], "dropped": meta["dropped"]}
    counts["skipped"] = sum(meta.get("skipped", {}).values())
    for name in ("samples", "blocks", "tokens", "learned") if validation else ():
        counts[f"validation_{name}"] = sum(m.get(name, 0) for m in validation)
    return counts
