"""What a validation finds, and that it is what training would do."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.finetune.errors import Cancelled, InvalidArgument
from services.finetune.formats import Conversation, Message, Row
from services.finetune.orders import ArtifactRef, PrepareRun, ValidateRun
from services.finetune.prepare import prepare
from services.finetune.prepare.validate import Twins, validate
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, load, publish
from tests.finetune.prepare.conftest import ROWS, dataset, do
from tests.finetune.prepare.test_images import cut, picture


def report(
    store: Store, folder: Path, revision: ArtifactRef, model: ArtifactRef | None = None, **given: Any
) -> dict[str, Any]:
    run = ValidateRun(job="workspaces/w/validations/v", dataset=revision, model=model, **given)
    found: dict[str, Any] = json.loads(b"".join(store.read_blob(do(validate, run, store, folder)[0]["report"])))
    return found


def test_bad_rows_are_counted_by_cause(file_store: Store, tmp_path: Path) -> None:
    bad = '{"instruction": "q"}\n' * 150 + "[\n" + '{"instruction": "q", "output": " "}\n'
    found = report(file_store, tmp_path / "w", dataset(file_store, ROWS, bad))
    assert (found["row_count"], found["bad_row_count"]) == (24, 152)
    assert found["causes"] == {"FIELD_MISSING": 150, "JSON_INVALID": 1, "ANSWER_EMPTY": 1}
    assert len(found["problems"]) == 100
    first = {k: found["problems"][0][k] for k in ("file", "row", "field", "reason")}
    assert first == {"file": "a.jsonl", "row": 25, "field": "output", "reason": "FIELD_MISSING"}
    assert "tokens" not in found and "images" not in found


def test_tokens_are_those_of_training(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    rows = [*ROWS, ("long", "a" * 300), ("q" * 200, "never reached"), ("say <|im_end|>", "no"), ("ok", "</s> [INST]")]
    revision = dataset(file_store, rows)
    found = report(file_store, tmp_path / "v", revision, order.model, template="tokenizer", max_length=128)["tokens"]
    run = replace(order, datasets=(revision,))
    meta = load(file_store, do(prepare, run, file_store, tmp_path / "p")[0]["prepared"]).meta
    assert found["truncated_row_count"] == meta["truncated"] == 2
    assert found["dropped_row_count"] == meta["dropped"] == 1
    bars = zip(meta["lengths"]["edges"], meta["lengths"]["counts"], strict=True)
    assert [(b["least"], b["row_count"]) for b in found["lengths"]] == [(least, n) for least, n in bars if n]
    whole = report(file_store, tmp_path / "x", revision, order.model)["tokens"]
    run = replace(run, data=replace(run.data, max_length=512))
    meta = load(file_store, do(prepare, run, file_store, tmp_path / "y")[0]["prepared"]).meta
    assert (whole["token_count"], whole["learned_count"]) == (meta["tokens"], meta["learned"])
    assert (whole["truncated_row_count"], whole["dropped_row_count"]) == (0, 0)
    assert found["template"] == whole["template"] == "tokenizer"
    assert found["max_length"] == 325 >= found["p99_length"] > found["median_length"] > 20
    assert found["special_row_count"] == 1
    (special,) = found["special_rows"]
    assert (special["row"], special["field"], special["reason"]) == (27, "turns[0]", "SPECIAL_TOKEN")
    assert "'<|im_end|>'" in special["message"]


def test_rows_that_come_twice_are_shown(file_store: Store, tmp_path: Path) -> None:
    rows = [("Q one", "A"), ("other", "B"), ("Q one", "A"), ("ｑ  ONE\n", "a"), ("Q one", "A!")]
    found = report(file_store, tmp_path / "w", dataset(file_store, rows))
    assert (found["exact_duplicate_count"], found["near_duplicate_count"]) == (1, 2)
    exact, near = found["duplicates"]
    assert exact == {"file": "a.jsonl", "row": 3, "first_file": "a.jsonl", "first_row": 1, "exact": True}
    assert near == {"file": "a.jsonl", "row": 4, "first_file": "a.jsonl", "first_row": 1, "exact": False}


@settings(deadline=None)  # the first call loads numpy
@given(st.lists(st.sampled_from(["a", "A", " a", "b", "c"]), max_size=30))
def test_duplicates_are_all_but_the_first(texts: list[str]) -> None:
    twins = Twins()
    for n, text in enumerate(texts):
        twins.add(Row("f", n, Conversation((Message("user", text),))))
    found = twins.report()
    near = [t.lower().strip() for t in texts]
    assert found["exact_duplicate_count"] == len(texts) - len(set(texts))
    assert found["near_duplicate_count"] == len(near) - len(set(near))
    assert [d["first_row"] for d in found["duplicates"]] == [near.index(near[d["row"]]) for d in found["duplicates"]][
        :20
    ]


def test_a_row_that_the_template_refuses_is_a_bad_row(file_store: Store, order: PrepareRun, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    refusal = "{% if messages[0]['content'] == 'say 3' %}{{ raise_exception('not three') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusal + (folder / "chat_template.jinja").read_text())
    from services.finetune.store.artifacts import publish_directory

    digest = publish_directory(file_store, "base", folder, meta={"template": "tokenizer"})
    found = report(file_store, tmp_path / "w", order.datasets[0], replace(order.model, digest=digest))
    assert found["causes"] == {"TEMPLATE_REFUSED": 1} and found["problems"][0]["row"] == 4
    assert found["row_count"] == 24 and sum(b["row_count"] for b in found["tokens"]["lengths"]) == 23


def test_images_beside_the_rows_are_opened(file_store: Store, tmp_path: Path) -> None:
    data = {"good.png": picture(tmp_path / "good", "PNG").read_bytes(), "cut.jpg": cut(tmp_path / "cut").read_bytes()}
    lines = [
        {
            "image": name,
            "conversations": [{"from": "human", "value": f"<image>\n{name}?"}, {"from": "gpt", "value": "x"}],
        }
        for name in ("good.png", "cut.jpg", "gone.png", "good.png")
    ]
    data["rows.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    blobs = {name: file_store.put_blob(content) for name, content in sorted(data.items())}
    files = tuple(File(name, blob.digest, blob.size) for name, blob in blobs.items())
    digest = publish(file_store, Manifest("dataset", files, (), {"format": "llava", "rows": 4}))
    found = report(file_store, tmp_path / "w", ArtifactRef(name="n", digest=digest))
    assert found["causes"] == {"IMAGE_INVALID": 1, "IMAGE_MISSING": 1} and found["bad_row_count"] == 2
    assert [(p["row"], p["field"]) for p in found["problems"]] == [(2, "images[0]"), (3, "images[0]")]
    assert found["images"] == {"row_count": 4, "image_count": 4, "good_count": 1}


def test_what_holds_no_rows_is_refused(file_store: Store, tmp_path: Path) -> None:
    blob = file_store.put_blob(b"{}")
    manifest = Manifest("dataset", (File("config.json", blob.digest, 2),), (), {"format": "files", "rows": 0})
    with pytest.raises(InvalidArgument) as caught:
        report(file_store, tmp_path / "w", ArtifactRef(name="n", digest=publish(file_store, manifest)))
    assert caught.value.reason == "DATASET_EMPTY"


def test_it_stops_when_asked_and_tells_how_far_it_is(file_store: Store, tmp_path: Path) -> None:
    run = ValidateRun(job="j", dataset=dataset(file_store))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        do(validate, run, file_store, tmp_path / "a", stop)
    _, events = do(validate, run, file_store, tmp_path / "b")
    told = [(e["done_rows"], e["total_rows"]) for e in events if e["type"] == "progress"]
    assert told == [(0, 24), (24, 24)]
    assert next(e["text"] for e in events if e["type"] == "log") == "24 rows read, 0 bad, 0 come twice"
