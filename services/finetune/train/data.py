"""From dataset revisions to blocks of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from services.finetune.config import TrainRun
from services.finetune.errors import InvalidArgument
from services.finetune.formats import Row, read_rows
from services.finetune.packing import Blocks, pack
from services.finetune.progress import Attempt
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise
from services.finetune.templates import Template, encode
from services.finetune.tokenizer import Tokenizer


def prepare(run: TrainRun, attempt: Attempt, template: Template, tokenizer: Tokenizer, workdir: Path) -> Blocks:
    """Read, tokenise and pack all datasets of a run. InvalidArgument (DATASET_EMPTY)."""
    data = run.config.data
    rows = list(read(attempt.store, run, workdir))
    samples = [encode(template.pieces(row.conversation, data.system), tokenizer) for row in rows]
    pack(samples, data.max_length, data.pack).save(workdir / "blocks")
    blocks = Blocks.open(workdir / "blocks")
    if not len(blocks):
        raise InvalidArgument(
            f"none of the {len(rows)} rows has an answer within data.max_length = {data.max_length} tokens",
            reason="DATASET_EMPTY",
        )
    tokens, learned = blocks.tokens, blocks.learned
    attempt.emit(
        "log",
        level="info",
        text=f"{len(rows)} rows in {len(blocks)} blocks of {blocks.ids.shape[1]} tokens: {tokens} tokens, {learned} "
        f"learned, {blocks.truncated} rows cut, {blocks.dropped} dropped",
    )
    return blocks


def read(store: Store, run: TrainRun, workdir: Path) -> Iterator[Row]:
    """The good rows of all datasets, in order; bad ones were settled when their revision was committed."""
    for n, dataset in enumerate(run.datasets):
        manifest = load(store, dataset.digest)
        if manifest.kind != "dataset" or manifest.meta["format"] == "files":
            raise InvalidArgument(f"{dataset.name} holds no rows", reason="DATASET_EMPTY")
        folder = materialise(store, manifest, workdir / "datasets" / str(n))
        files = [(f.path, folder / f.path) for f in manifest.files]
        yield from (row for row in read_rows(files, manifest.meta["format"]) if isinstance(row, Row))
