"""Preparing: dataset revisions become packed blocks of tokens, kept in the store under what they were made from.

`prepare` is the whole of a preparing worker's work; a training worker comes in by `obtain`. An artifact of kind
"prepared" holds the blocks, and in its meta the counts and the parity certificate, which is also certificate.json.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.finetune import vision
from services.finetune.errors import Cancelled, InvalidArgument
from services.finetune.formats.containers import is_row_file
from services.finetune.orders import ArtifactRef, PrepareRun
from services.finetune.prepare import shelf
from services.finetune.prepare.certificate import META, Certificate, certify
from services.finetune.prepare.images import REASONS
from services.finetune.progress import Attempt
from services.finetune.store import Store
from services.finetune.store.artifacts import Manifest, Parent, load, materialise, publish_directory

if TYPE_CHECKING:
    from services.finetune.prepare.pipeline import Built
    from services.finetune.prepare.shards import Source

MADE = "prepared"
"""The folder below a worker's own in which blocks that it made itself lie."""
MAX_WEIGHT = 100.0
TOLD_PROBLEMS = 5
TOLD_S = 1.0
"""Seconds between two progress events."""


def prepare(run: PrepareRun, attempt: Attempt, stop: threading.Event, workdir: Path) -> dict[str, Any]:
    """Do an order; {"prepared": digest}.

    Raises Cancelled (STOPPED) when `stop` is set, InvalidArgument (DATASET_EMPTY, VALIDATION_EMPTY, TEMPLATE_UNKNOWN,
    TEMPLATE_REFUSED, IMAGES_UNSUPPORTED), FailedPrecondition (TOKENIZER_MISSING, TEMPLATE_MISSING, VISION_UNSUPPORTED,
    IMAGE_TOKEN_MISSING).
    """
    from services.finetune.templates import load_template
    from services.finetune.tokenizer import FILES, Tokenizer

    read = (*FILES, *vision.FILES)
    folder = materialise(attempt.store, load(attempt.store, run.model.digest), workdir / "model", read)
    tokenizer = Tokenizer.from_files(folder)
    certificate = certify(tokenizer, load_template(run.data.template, tokenizer))
    return {"prepared": obtain(run, certificate, folder, attempt, stop, workdir)}


def obtain(
    run: PrepareRun,
    certificate: Certificate,
    model_dir: Path,
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
) -> str:
    """The digest of the prepared artifact of an order; it is made only if nobody has made it. Errors as `prepare`."""
    key = shelf.shelf_key(run, certificate, vision.read_form(model_dir))
    made = False

    def make() -> str:
        nonlocal made
        made = True
        return _make(run, certificate, model_dir, attempt, stop, workdir)

    def waiting() -> None:
        attempt.emit("log", level="info", text="another job prepares the same data; waiting for it")

    digest = shelf.obtain(attempt.store, key, attempt.job_key, make, stop, waiting)
    attempt.emit("log", level="info", text=told(load(attempt.store, digest), made))
    return digest


def told(manifest: Manifest, made: bool) -> str:
    """What a prepared artifact holds, for people."""
    m = manifest.meta
    held = f", {m['held_out']['samples']} held out" if "held_out" in m else ""
    images = f", {m['images']['count']} images, {m['images']['cut']} of them cut off" if m.get("images") else ""
    drawn = f", {m['drawn']} of them drawn," if m.get("drawn") else ""
    return (
        f"{m['rows']} rows{drawn} in {m['blocks']} blocks{'' if made else ' prepared before'}: {m['tokens']} tokens, "
        f"{m['learned']} learned, {m['truncated']} rows cut, {m['dropped']} dropped{images}{held}"
    )


def check_weights(weights: Sequence[float], datasets: int) -> None:
    """InvalidArgument (CONFIG_VALUE_INVALID) unless there is one weight a dataset, or none, each above 0 and sensible."""
    if weights and len(weights) != datasets:
        raise _bad_weights(f"there are {len(weights)} for {datasets} datasets; give one each, or none")
    for weight in weights:
        if not 0 < weight <= MAX_WEIGHT:
            raise _bad_weights(f"{weight:g} is not above 0 and at most {MAX_WEIGHT:g}")


def holds_rows(manifest: Manifest) -> bool:
    """Whether an artifact is a dataset of rows, and not of other files."""
    return manifest.kind == "dataset" and manifest.meta["format"] != "files"


def local_files(store: Store, manifest: Manifest, folder: Path) -> tuple[tuple[str, Path], ...]:
    """(path in the artifact, path on disk) of a dataset's files, put below `folder`."""
    materialise(store, manifest, folder)
    return tuple((f.path, folder / f.path) for f in manifest.files)


def row_files(files: Sequence[tuple[str, Path]]) -> tuple[tuple[str, Path], ...]:
    """Those of a dataset's files that hold rows: images lie beside them."""
    return tuple(f for f in files if is_row_file(f[0]))


def progress(attempt: Attempt, stop: threading.Event, total: int) -> Callable[[int], None]:
    """A callback of rows done that reports now and then, and obeys `stop`."""
    last = 0.0

    def tell(done: int) -> None:
        nonlocal last
        if stop.is_set():
            raise Cancelled("stopped; nothing half-made was kept", reason="STOPPED")
        if time.monotonic() - last >= TOLD_S or done == total:
            last = time.monotonic()
            attempt.emit("progress", done_rows=done, total_rows=total)

    return tell


def _make(
    run: PrepareRun,
    certificate: Certificate,
    model_dir: Path,
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
) -> str:
    from services.finetune.prepare.pipeline import build

    store, out = attempt.store, workdir / MADE
    manifests = [load(store, dataset.digest) for dataset in run.datasets]
    weights = run.data.weights or (1.0,) * len(run.datasets)
    sources = [
        _source(store, dataset, manifest, weight, workdir / "datasets" / str(n))
        for n, (dataset, manifest, weight) in enumerate(zip(run.datasets, manifests, weights, strict=True))
    ]
    tell = progress(attempt, stop, sum(int(m.meta["rows"]) for m in manifests))
    try:
        built = build(
            sources, run.data.template, model_dir, run.data, run.seed, out, held_out=run.held_out, on_rows=tell
        )
    except BrokenProcessPool:
        # The signal to end met helpers that had just been started.
        if not stop.is_set():
            raise
    if stop.is_set():
        raise Cancelled("stopped; nothing half-made was kept", reason="STOPPED")
    if told := _left_out(built):
        attempt.emit("log", level="warning", text=told)
    (out / "certificate.json").write_text(json.dumps(certificate, sort_keys=True, indent=1, ensure_ascii=False))
    parents = [Parent("dataset", d.digest, d.name) for d in run.datasets]
    return publish_directory(store, "prepared", out, parents, {**_counts(built), META: certificate})


def _left_out(built: Built) -> str:
    """The rows that were left out for their images: no other bad row is news since its revision was committed."""
    causes = {reason: count for reason, count in built.index["skipped"].items() if reason in REASONS}
    if not causes:
        return ""
    some = [p for p in built.problems if p.reason in REASONS][:TOLD_PROBLEMS]
    count = ", ".join(f"{count} {reason}" for reason, count in causes.items())
    rows = "; ".join(f"files[{p.file}].rows[{p.row}].{p.field}: {p.message}" for p in some)
    return f"rows are left out for their images: {count}; {rows}"


def _counts(built: Built) -> dict[str, Any]:
    names = ("tokens", "learned", "blocks", "fill", "truncated", "dropped", "lengths", "drawn")
    good = built.index["rows"] - sum(built.index["skipped"].values())
    counts = {"rows": good, **{name: built.index[name] for name in names}}
    counts |= {"samples": built.index["laid_out"], "skipped": built.index["skipped"]}
    if "images" in built.index:
        counts["images"] = built.index["images"]
    if "held_out" in built.index:
        held = built.index["held_out"]
        counts["held_out"] = {"samples": held["laid_out"]} | {
            name: held[name] for name in ("blocks", "tokens", "learned")
        }
    return counts


def _source(store: Store, dataset: ArtifactRef, manifest: Manifest, weight: float, folder: Path) -> Source:
    from services.finetune.prepare.shards import Source

    if not holds_rows(manifest):
        raise InvalidArgument(f"{dataset.name} holds no rows", reason="DATASET_EMPTY")
    if manifest.meta["format"] == "preference":
        raise InvalidArgument(
            f"{dataset.name} holds preference pairs, from which no method learns yet; to learn the chosen answers commit "
            "its files with the format preference_chosen",
            reason="DATASET_EMPTY",
        )
    files, digests = local_files(store, manifest, folder), {f.path: f.digest for f in manifest.files}
    return Source(
        name=dataset.name,
        files=row_files(files),
        format=manifest.meta["format"],
        columns=manifest.meta.get("columns") or {},
        weight=weight,
        images={name: (digests[name], path) for name, path in files if not is_row_file(name)},
    )


def _bad_weights(why: str) -> InvalidArgument:
    return InvalidArgument(f"data.weights: {why}", reason="CONFIG_VALUE_INVALID", metadata={"key": "data.weights"})
