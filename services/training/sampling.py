"""How much there is to learn from: as it was prepared before, or scaled up from some rows that are looked at now."""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune import vision
from services.finetune.config import RunConfig
from services.finetune.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from services.finetune.orders import ArtifactRef, PrepareRun, TrainRun
from services.finetune.prepare import row_files
from services.finetune.prepare.certificate import certify
from services.finetune.prepare.pipeline import build
from services.finetune.prepare.shards import Source
from services.finetune.prepare.shelf import find, shelf_key
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, load, materialise
from services.finetune.templates import load_template
from services.finetune.tokenizer import FILES, Tokenizer

PIECES, PIECE_BYTES = 16, 1 << 16
"""Of a large file of JSON lines, so many pieces are read."""
WHOLE_BYTES = 4 << 20
"""Files of other kinds are read whole up to here."""
LIMIT_S = 10.0
"""For all datasets of a run together."""


@dataclass(frozen=True, slots=True)
class Figures:
    """For one epoch; see DataFigures of the contract."""

    rows: int
    samples: int
    blocks: int
    block_length: int
    tokens: int
    learned_tokens: int
    truncated_rows: int
    dropped_rows: int
    sampled_rows: int = 0
    images: int = 0


def figures(store: Store, run: TrainRun) -> Figures:
    """What is on the shelf for this run, else an estimate.

    FailedPrecondition (NOT_SAMPLED) where nothing can be said within LIMIT_S, and what reading the rows raises.
    """
    manifest = load(store, run.base.digest)
    with tempfile.TemporaryDirectory(prefix="quartet-plan-") as folder:
        model = materialise(store, manifest, Path(folder) / "model", (*FILES, *vision.FILES))
        tokenizer = Tokenizer.from_files(model)
        template = load_template(run.config.data.template or manifest.meta["template"], tokenizer)
        data = dataclasses.replace(run.config.data, template=template.name)
        order = PrepareRun(
            job=run.job,
            model=run.base,
            datasets=run.datasets,
            data=data,
            seed=run.config.schedule.seed,
            held_out=run.config.validation.ratio,
        )
        digest = find(store, shelf_key(order, certify(tokenizer, template), vision.read_form(model)))
        if digest is not None:
            return _known(load(store, digest), run.config)
        return _sampled(store, run, template.name, model, Path(folder))


def _known(prepared: Manifest, config: RunConfig) -> Figures:
    meta = prepared.meta
    return Figures(
        rows=meta["rows"],
        samples=meta.get("samples", meta["rows"] - meta["dropped"]),
        blocks=meta["blocks"],
        block_length=round(meta["tokens"] / (meta["blocks"] * meta["fill"])),
        tokens=meta["tokens"],
        learned_tokens=meta["learned"],
        truncated_rows=meta["truncated"],
        dropped_rows=meta["dropped"],
        images=_images(meta),
    )


def _sampled(store: Store, run: TrainRun, template: str, model: Path, folder: Path) -> Figures:
    deadline = time.monotonic() + LIMIT_S

    def in_time(_: int) -> None:
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"looking at rows took more than {LIMIT_S:.0f} s", reason="NOT_SAMPLED")

    data, seed = run.config.data, run.config.schedule.seed
    found: list[Figures] = []
    for n, (dataset, weight) in enumerate(zip(run.datasets, data.weights or (1.0,) * len(run.datasets), strict=True)):
        manifest = load(store, dataset.digest)
        source = _some_rows(store, dataset, manifest, seed, folder / f"rows-{n}")
        built = build([source], template, model, data, seed, folder / f"blocks-{n}", processes=1, on_rows=in_time)
        index = built.index
        grown = manifest.meta["rows"] / index["rows"]
        weight *= 1 - run.config.validation.ratio
        found.append(_scaled(index, grown, weight, int(manifest.meta["rows"]), data.pack))
    length = max(f.block_length for f in found)
    sums = {f.name: sum(getattr(one, f.name) for one in found) for f in dataclasses.fields(Figures)}
    return Figures(**{**sums, "block_length": length})


def _scaled(at: Mapping[str, Any], grown: float, weight: float, rows: int, pack: bool) -> Figures:
    """From what pipeline.build wrote of some rows."""
    times, good = grown * weight, at["rows"] - at["dropped"]
    length = round(at["tokens"] / (at["blocks"] * at["fill"]))
    # One block of the sample is half empty for want of more rows.
    blocks = (at["blocks"] - (0.5 if pack and grown > 1 else 0)) * times
    return Figures(
        rows=rows,
        samples=round(good * times),
        blocks=max(1, math.ceil(blocks)),
        block_length=length,
        tokens=round(at["tokens"] * times),
        learned_tokens=round(at["learned"] * times),
        truncated_rows=round(at["truncated"] * grown),
        dropped_rows=round(at["dropped"] * grown),
        sampled_rows=round(at["rows"]),
        images=round(_images(at) * times),
    )


def _images(at: Mapping[str, Any]) -> int:
    shown: int = at.get("images", {}).get("count", 0)
    return shown


def _some_rows(store: Store, dataset: ArtifactRef, manifest: Manifest, seed: int, folder: Path) -> Source:
    folder.mkdir()
    names = {f.path: f for f in manifest.files}
    chosen = [names[path] for path, _ in row_files([(f.path, folder) for f in manifest.files])]
    if not chosen:
        raise InvalidArgument(f"{dataset.name} holds no rows", reason="DATASET_EMPTY")
    draw, files = random.Random(seed), []
    for n, file in enumerate(sorted(draw.sample(chosen, min(4, len(chosen))), key=lambda f: f.path)):
        path = folder / f"{n}{''.join(Path(file.path).suffixes)}"
        path.write_bytes(_lines(store, file, draw) if _is_lines(file) else _whole(store, file, dataset))
        files.append((file.path, path))
    columns = manifest.meta.get("columns") or {}
    return Source(name=dataset.name, files=tuple(files), format=manifest.meta["format"], columns=columns, weight=1.0)


def _is_lines(file: File) -> bool:
    return file.path.endswith((".jsonl", ".ndjson"))


def _lines(store: Store, file: File, draw: random.Random) -> bytes:
    """Whole lines from all over a file."""
    if file.size <= PIECES * PIECE_BYTES:
        return b"".join(store.read_blob(file.digest))
    lines: list[bytes] = []
    for offset in sorted(draw.sample(range(file.size - PIECE_BYTES), PIECES)):
        piece = b"".join(store.read_blob(file.digest, offset, PIECE_BYTES))
        lines += piece.split(b"\n")[1:-1]
    if not lines:
        raise FailedPrecondition(f"rows of {file.path} are longer than {PIECE_BYTES} bytes", reason="NOT_SAMPLED")
    return b"\n".join(lines) + b"\n"


def _whole(store: Store, file: File, dataset: ArtifactRef) -> bytes:
    if file.size > WHOLE_BYTES:
        raise FailedPrecondition(
            f"{file.path} is too large to be looked into now; prepare the dataset first, or commit it as .jsonl",
            reason="NOT_SAMPLED",
            metadata={"name": dataset.name},
        )
    return b"".join(store.read_blob(file.digest))
