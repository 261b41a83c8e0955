"""A store with a tiny model's tokenizer and a dataset, and orders done as a worker does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.finetune.config import DataConfig
from services.finetune.orders import ArtifactRef, PrepareRun
from services.finetune.progress import Attempt, raise_fence, read_segments
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, publish, publish_directory
from tests.tiny import tiny_tokenizer

Rows = Sequence[tuple[str, str]]
ROWS: Rows = [(f"say {n}", f"{n} it is") for n in range(24)]


def dataset(store: Store, rows: Rows = ROWS, extra: str = "") -> ArtifactRef:
    """A revision of alpaca rows; `extra` are further lines, which may be bad."""
    lines = "".join(json.dumps({"instruction": q, "output": a}, ensure_ascii=False) + "\n" for q, a in rows)
    blob = store.put_blob((lines + extra).encode())
    meta = {"format": "alpaca", "rows": len(rows), "skipped_rows": extra.count("\n"), "skipped": []}
    digest = publish(store, Manifest("dataset", (File("a.jsonl", blob.digest, blob.size),), (), meta))
    return ArtifactRef(name="workspaces/w/datasets/d/revisions/r", digest=digest)


def model(store: Store, folder: Path) -> ArtifactRef:
    """A model that is only a tokenizer."""
    digest = publish_directory(store, "base", tiny_tokenizer(folder), meta={"template": "tokenizer"})
    return ArtifactRef(name="workspaces/w/models/m", digest=digest)


@pytest.fixture()
def order(file_store: Store, tmp_path: Path) -> PrepareRun:
    data = DataConfig(template="tokenizer", max_length=128)
    base = model(file_store, tmp_path / "model")
    return PrepareRun(job="workspaces/w/preparedDatasets/p", model=base, datasets=(dataset(file_store),), data=data)


def weighed(order: PrepareRun, datasets: Sequence[ArtifactRef], *weights: float) -> PrepareRun:
    return replace(order, datasets=tuple(datasets), data=replace(order.data, weights=weights))


def do(
    work: Callable[..., dict[str, Any]], run: Any, store: Store, folder: Path, stop: threading.Event | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(result, events) of an order done in this process."""
    folder.mkdir()
    key = f"jobs/{folder.name}"
    raise_fence(store, key, 1)
    with Attempt(store, key, 1) as attempt:
        attempt.claim({"pid": 1})
        result = work(run, attempt, stop or threading.Event(), folder)
    return result, [e for _, part in read_segments(store, key, 1, -1) for e in part]
