"""Orders to prepare, done by the real worker and in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from services.finetune.config import to_json
from services.finetune.errors import Cancelled, InvalidArgument
from services.finetune.orders import PrepareRun
from services.finetune.packing import Blocks
from services.finetune.prepare import check_weights, prepare
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, run_uri
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise, read_file
from services.finetune.tokenizer import Tokenizer
from tests.finetune.prepare.conftest import ROWS, dataset, do, model, weighed


def texts(store: Store, digest: str, folder: Path) -> list[str]:
    """What is learned of each sample, sorted."""
    blocks = Blocks.open(materialise(store, load(store, digest), folder / "blocks"))
    tokenizer = Tokenizer.from_files(folder / "model")
    found = []
    for block in range(len(blocks)):
        for segment in range(1, blocks.segments[block].max() + 1):
            learned = (blocks.segments[block] == segment) & (blocks.labels[block] >= 0)
            found.append(tokenizer.decode(blocks.ids[block][learned].tolist()))
    return sorted(found)


def test_a_worker_prepares_what_the_next_finds(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    def work(key: str) -> str:
        raise_fence(file_store, key, 1)
        file_store.put(f"{attempt_key(key, 1)}/run.json", dump(to_json(order)))
        command = [sys.executable, "-m", "services.finetune", "prepare", run_uri(file_store.uri, key, 1)]
        assert subprocess.run(command, timeout=60).returncode == 0
        ended = read_outcome(file_store, key)
        assert ended is not None and ended[1].state == "SUCCEEDED"
        return str(ended[1].result["prepared"])

    digest = work("jobs/a")
    manifest = load(file_store, digest)
    assert manifest.kind == "prepared" and [p.role for p in manifest.parents] == ["dataset"]
    assert manifest.meta["rows"] == len(ROWS) == sum(manifest.meta["lengths"]["counts"])
    assert json.loads(read_file(file_store, manifest, "certificate.json")) == manifest.meta["certificate"]
    assert texts(file_store, digest, tmp_path) == sorted(f"{n} it is" for n in range(24))
    before = file_store.list("manifests/")
    assert work("jobs/b") == digest and file_store.list("manifests/") == before


def test_equal_orders_make_equal_bytes(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    first = do(prepare, order, file_store, tmp_path / "one")[0]["prepared"]
    for entry in file_store.list("prepared/"):
        file_store.delete(entry.key)
    assert do(prepare, order, file_store, tmp_path / "two")[0]["prepared"] == first


def test_datasets_are_weighed(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    other = dataset(file_store, [(f"q{n}", f"other {n}") for n in range(10)])
    run = weighed(order, [*order.datasets, other], 2.0, 0.5)
    digest = do(prepare, run, file_store, tmp_path / "w")[0]["prepared"]
    found = texts(file_store, digest, tmp_path / "w")
    mine = [t for t in found if not t.startswith("other")]
    half = [t for t in found if t.startswith("other")]
    assert mine == sorted([f"{n} it is" for n in range(24)] * 2)
    assert len(half) == len(set(half)) == 5
    again = do(prepare, replace(run, seed=7), file_store, tmp_path / "x")[0]["prepared"]
    assert [t for t in texts(file_store, again, tmp_path / "x") if t.startswith("other")] != half


def test_wrong_weights_are_refused() -> None:
    check_weights((), 2)
    check_weights((0.5, 100.0), 2)
    for weights in ((1.0,), (1.0, 0.0), (1.0, 101.0), (1.0, float("nan"))):
        with pytest.raises(InvalidArgument) as caught:
            check_weights(weights, 2)
        assert caught.value.reason == "CONFIG_VALUE_INVALID"


def test_rows_without_an_answer_in_reach_are_told(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    run = replace(order, data=replace(order.data, max_length=8))
    with pytest.raises(InvalidArgument) as caught:
        do(prepare, run, file_store, tmp_path / "w")
    assert caught.value.reason == "DATASET_EMPTY" and "max_length = 8" in caught.value.message
    assert not file_store.list("prepared/")


def test_a_row_that_the_template_refuses_is_blamed(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    base = model(file_store, tmp_path / "picky")
    jinja = tmp_path / "picky" / "chat_template.jinja"
    refusal = "{% if messages[0]['content'] == 'say 3' %}{{ raise_exception('not three') }}{% endif %}"
    jinja.write_text(refusal + jinja.read_text())
    from services.finetune.store.artifacts import publish_directory

    digest = publish_directory(file_store, "base", tmp_path / "picky", meta={"template": "tokenizer"})
    run = replace(order, model=replace(base, digest=digest))
    with pytest.raises(InvalidArgument, match=r"files\[a.jsonl\].rows\[4\].*not three"):
        do(prepare, run, file_store, tmp_path / "w")


def test_it_stops_when_asked(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    before = file_store.list("manifests/")
    with pytest.raises(Cancelled):
        do(prepare, order, file_store, tmp_path / "w", stop)
    assert file_store.list("manifests/") == before and not file_store.list("prepared/")


def test_progress_is_told_in_rows(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    rows = [(f"q{n}", "a") for n in range(1000)]
    _, events = do(prepare, weighed(order, [dataset(file_store, rows)]), file_store, tmp_path / "w")
    told = [e for e in events if e["type"] == "progress"]
    assert told[-1]["done_rows"] == told[-1]["total_rows"] == 1000
    assert "1000 rows in" in next(e["text"] for e in events if e["type"] == "log")


def test_one_row_is_one_block(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    run = weighed(order, [dataset(file_store, [("q", "a")])])
    meta = load(file_store, do(prepare, run, file_store, tmp_path / "w")[0]["prepared"]).meta
    assert (meta["rows"], meta["blocks"], meta["truncated"], meta["dropped"]) == (1, 1, 0, 0)
    assert np.isclose(meta["fill"], meta["tokens"] / 128)
