"""Rows to look at: which they are, what their loss is, and what follows from it."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from services.finetune import packing
from services.finetune.errors import Cancelled, InvalidArgument
from services.finetune.orders import PrepareRun
from services.finetune.packing import HELD_OUT, Blocks, held, offsets_of
from services.finetune.prepare import prepare
from services.finetune.progress import Attempt, raise_fence
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise
from services.finetune.templates import Encoded
from services.finetune.train import validation
from services.finetune.train.engine import Autograd
from services.finetune.train.model import load_model
from services.finetune.train.validation import Looks, mean_loss
from tests.finetune.train.running import dataset, numbers, order, report, run, told
from tests.tiny import tiny_model


def samples_of(blocks: Blocks) -> list[bytes]:
    flat = blocks.flat
    return [bytes(flat.sample(int(n))[0].astype("<i4")) for n in flat.members]


def prepared(store: Store, folder: Path, rows: Any, ratio: float, **data: Any) -> tuple[Blocks, Blocks, dict[str, Any]]:
    """The blocks to learn from and those held out, and what the artifact says of itself."""
    run = order(store, folder, rows)
    wanted = PrepareRun(
        job="workspaces/w/preparedDatasets/p",
        model=run.base,
        datasets=run.datasets,
        data=dataclasses.replace(run.config.data, template="tokenizer", **data),
        seed=3,
        held_out=ratio,
    )
    key = f"jobs/{folder.name}"
    raise_fence(store, key, 1)
    with Attempt(store, key, 1) as attempt:
        digest = prepare(wanted, attempt, threading.Event(), folder)["prepared"]
    manifest = load(store, digest)
    out = materialise(store, manifest, folder / "out")
    return Blocks.open(out), Blocks.open(out, HELD_OUT), dict(manifest.meta)


def test_no_row_stands_on_both_sides_and_weights_do_not_reach_over(file_store: Store, tmp_path: Path) -> None:
    rows = numbers(0, 100) + numbers(0, 30) + numbers(0, 30)  # some are there three times
    random.Random(1).shuffle(rows)
    learned, apart, meta = prepared(file_store, tmp_path / "a", rows, 0.2, weights=(2.0,))
    ours, theirs = samples_of(learned), samples_of(apart)
    assert not set(ours) & set(theirs)
    assert len(set(theirs)) == 20 and len(set(ours)) == 80
    assert len(ours) == 2 * (len(rows) - len(theirs))
    assert meta["held_out"]["samples"] == len(theirs) and meta["samples"] == len(ours)
    assert meta["held_out"]["learned"] == apart.learned == int((apart.labels[:] >= 0).sum())
    # More rows move nobody but a few at the border.
    _, later, _ = prepared(file_store, tmp_path / "b", rows + numbers(100, 110), 0.2)
    assert len(set(theirs) - set(samples_of(later))) <= 2


def test_held_out_is_a_part_and_never_all_or_nothing() -> None:
    tokens = np.arange(40, dtype="<u2")
    offsets = offsets_of(np.full(10, 4))
    for ratio, count in ((0.01, 1), (0.3, 3), (0.99, 9)):
        assert held(tokens, offsets, ratio, 0).sum() == count
    seeds = {tuple(held(tokens, offsets, 0.3, seed)) for seed in range(20)}
    assert len(seeds) > 10
    with pytest.raises(InvalidArgument, match="all rows are the same") as caught:
        held(np.zeros(40, "<u2"), offsets, 0.3, 0)
    assert caught.value.reason == "VALIDATION_EMPTY"


def test_the_loss_is_transformers_own(tmp_path: Path, file_store: Store) -> None:
    """Row by row through the model, without packing, masks of ours or micro-batches."""
    what = order(file_store, tmp_path)
    model = load_model(tiny_model(tmp_path / "tiny"), what.config, torch.float32)
    draw = np.random.default_rng(0)
    encoded = [Encoded(draw.integers(3, 250, size).tolist(), [True] * size) for size in draw.integers(5, 40, 17)]
    engine = Autograd(model, packing.pack(encoded, 64, True), torch.device("cpu"), torch.float32)
    sets = [packing.pack(encoded[:9], 64, True), packing.pack(encoded[9:], 64, False)]
    ours = mean_loss(engine, sets, 3, threading.Event())
    total = count = 0.0
    with torch.no_grad():
        for sample in encoded:
            ids = torch.tensor([sample.ids])
            total += float(model(input_ids=ids, labels=ids).loss) * (len(sample.ids) - 1)
            count += len(sample.ids) - 1
    assert ours == pytest.approx(total / count, rel=1e-5)


def test_looks_count_only_what_is_lower_by_enough() -> None:
    looks = Looks()
    best = [looks.add(n, loss, 0.1) for n, loss in enumerate((2.0, 1.95, 1.8, 1.75, 1.9, 1.72))]
    assert best == [True, True, True, True, False, True]
    assert looks == Looks(step=5, loss=1.72, best=1.72, bar=1.8, stale=3)


def test_a_run_ends_when_validation_gets_no_better_and_its_best_is_the_result(
    file_store: Store, tmp_path: Path
) -> None:
    """Twenty rows learned by heart say nothing about others: their loss falls, then rises."""
    nonsense = random.Random(5)
    others = [(f"say {n}", "".join(nonsense.choices("abcdefgh", k=9))) for n in range(100, 120)]
    what = order(
        file_store,
        tmp_path,
        numbers(0, 20),
        schedule__epochs=60,
        validation__every=4,
        validation__patience=3,
        report__keep_best=True,
        report__keep_last=1,
        report__checkpoint_every=1000,
    )
    what = dataclasses.replace(what, validation=(dataset(file_store, others),))
    result = run(file_store, what, tmp_path, "jobs/early")
    looks = [e for e in told(file_store, "jobs/early", "metric") if "validation_loss" in e["values"]]
    losses = {e["step"]: e["values"]["validation_loss"] for e in looks}
    best = min(losses, key=lambda step: losses[step])
    assert looks[0]["values"]["validation_perplexity"] == pytest.approx(math.exp(losses[4]))
    assert max(losses) == best + 3 * 4 and "ended early" in result["message"]
    assert result["step"] == best
    saved = {e["step"]: e for e in told(file_store, "jobs/early", "checkpoint")}
    assert saved[best]["digest"] == result["checkpoint"] and saved[best]["validation_loss"] == losses[best]
    assert json.loads((report(file_store, "jobs/early", tmp_path) / "summary.json").read_text())["state"] == "SUCCEEDED"


def test_a_run_stopped_in_its_look_looks_again_and_ends_where_it_would_have(
    file_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "validation__ratio": 0.2,
        "validation__every": 2,
        "validation__patience": 1,
        "validation__min_delta": 0.02,
    }
    what = order(file_store, tmp_path, schedule__epochs=20, **changes)
    whole = run(file_store, what, tmp_path, "jobs/whole")
    looks = [e for e in told(file_store, "jobs/whole", "metric") if "validation_loss" in e["values"]]
    stop, real = threading.Event(), validation.mean_loss

    def stopped(*given: Any) -> float | None:
        stop.set()
        return real(*given)

    monkeypatch.setattr("services.finetune.train.loop.mean_loss", stopped)
    with pytest.raises(Cancelled):
        run(file_store, what, tmp_path, "jobs/cut", 1, stop)
    monkeypatch.undo()
    assert [e["step"] for e in told(file_store, "jobs/cut", "checkpoint")] == [2]
    again = run(file_store, what, tmp_path, "jobs/cut", 2)
    assert (again["step"], again["checkpoint"]) == (whole["step"], whole["checkpoint"])
    second = [e for e in told(file_store, "jobs/cut", "metric", 2) if "validation_loss" in e["values"]]
    assert [e["values"]["validation_loss"] for e in second] == [e["values"]["validation_loss"] for e in looks]
