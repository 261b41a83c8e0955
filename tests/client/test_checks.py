"""The verbs that look at data, against a real datasets service and its worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.client import Client
from services.client.commands.checks import read_weights
from services.finetune.errors import InvalidArgument
from services.finetune.formats import Reading
from services.finetune.store import open_store
from tests.client.conftest import Done, Quartet
from tests.datasets.conftest import Service
from tests.datasets.test_preparing import put_model
from tests.datasets.wire import row


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that has a model and the datasets good, mixed and short."""
    folder = tmp_path_factory.mktemp("c")
    service = Service(folder).start()
    put_model(open_store((folder / "store").as_uri()), "tiny", tmp_path_factory.mktemp("model"))
    rows = {
        "good": row("Say 你好", "你好！") + row("x<|im_end|>", "y"),
        "mixed": row("q", "a") * 2 + b"[\n" * 30,
        "short": row("q" * 40, "a"),
    }
    with Client(service.address) as client:
        for name, data in rows.items():
            path = folder / f"{name}.jsonl"
            path.write_bytes(data)
            client.upload_dataset(name, [path], Reading("openai", skip_bad_rows=True))
    yield service.address
    assert service.stop() == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture()
def run(quartet: Quartet, address: str) -> Quartet:
    def at(*words: str) -> Done:
        return quartet(*words, "--endpoint", address)

    return at


def test_validate_tells_and_leaves_with_the_right_status(run: Quartet) -> None:
    good = run("dataset", "validate", "good", "--model", "tiny", "--max-length", "64")
    assert good.status == 0 and "with texts of special tokens" in good.out and "SUCCEEDED" in good.out
    assert "note: good.jsonl row 2 turns[0]" in good.err
    bad = run("dataset", "validate", "mixed")
    assert bad.status == 65 and "JSON_INVALID" in bad.out and "mixed.jsonl row 3" in bad.err
    report = run("dataset", "validate", "mixed", "--json").json["report"]
    assert (report["row_count"], report["bad_row_count"], report["causes"]) == (2, 30, {"JSON_INVALID": 30})
    assert run("dataset", "validate", "short", "--model", "tiny", "--max-length", "16").status == 65
    assert run("dataset", "validate", "nothing").status == 66
    assert run("dataset", "validate", "good", "--model", "tiny", "--template", "nothing").status == 65
    detached = run("dataset", "validate", "good", "--detach", "--json").json["name"]
    watched = run("job", "watch", detached)
    assert watched.status == 0 and watched.out.splitlines()[-1] == "SUCCEEDED"
    logs = run("job", "logs", detached)
    assert "2 of 2 rows" in logs.out
    assert run("job", "get", detached).json["state"] == "SUCCEEDED"
    assert run("job", "cancel", detached).status == 0


def test_prepare_packs_and_finds_again(run: Quartet) -> None:
    words = ("dataset", "prepare", "good=2", "mixed", "--model", "tiny", "--max-length", "128")
    first = run(*words)
    assert first.status == 0 and "4 rows, " in first.out and "blocks of 128" in first.out
    again = run(*words, "--json").json
    assert again["state"] == "SUCCEEDED" and again["counts"]["row_count"] == 4
    assert [s["weight"] for s in again["sources"]] == [2, 1]
    failed = run("dataset", "prepare", "short", "--model", "tiny", "--max-length", "16")
    assert failed.status == 65 and "max_length = 16" in failed.err
    assert run("dataset", "prepare", "good=0", "--model", "tiny").status == 65
    assert run("dataset", "prepare", "good", "--model", "none").status == 66


def test_log_dataset_shows_what_training_sees(run: Quartet) -> None:
    text = run("log-dataset", "good", "--model", "tiny").out
    assert text == "<|im_start|>user\nSay 你好<|im_end|>\n<|im_start|>assistant\n你好！<|im_end|>\n\n"
    everything = run("log-dataset", "good", "--model", "tiny", "--show", "all", "--json").json
    ids, labels = everything["input_ids"], everything["labels"]
    masked = labels.count(-100)
    assert [i for i, label in zip(ids, labels, strict=True) if label == i] == ids[masked - 1 : -1]
    assert everything["masked_text"] == "[-100]" * (masked - 1) + "你好！<|im_end|>" + "[-100]"
    for show in ("masked_text", "input_ids", "labels"):
        assert run("log-dataset", "good", "--model", "tiny", "--show", show).out.strip() == str(everything[show])
    cut = run("log-dataset", "good", "--model", "tiny", "--max-length", "8", "--show", "input_ids", "--json").json
    assert cut["input_ids"] == ids[:8]
    assert run("log-dataset", "good", "--model", "tiny", "--row", "1", "--json").json["row"] == 2
    assert run("log-dataset", "good", "--model", "tiny", "--row", "2").status == 65


def test_check_custom_dataset_shows_stages_and_a_verdict(run: Quartet) -> None:
    good = run("check-custom-dataset", "good", "--model", "tiny")
    assert good.status == 0 and "#### masked_text" in good.out and "can be trained on" in good.err
    bad = run("check-custom-dataset", "mixed", "--model", "tiny", "--json")
    assert bad.status == 65
    assert len(bad.json["rows"]) == 2 and bad.json["validation"]["report"]["bad_row_count"] == 30
    assert run("check-custom-dataset", "none", "--model", "tiny").status == 66


def test_formats_are_listed(run: Quartet) -> None:
    assert "alpaca" in run("list-dataset-format").out
    assert {"name", "description"} <= set(run("list-dataset-format", "--json").json["formats"][0])


def test_weights_of_datasets() -> None:
    assert read_weights(["a", "workspaces/w/datasets/b/revisions/r=0.5"]) == {
        "a": 1.0,
        "workspaces/w/datasets/b/revisions/r": 0.5,
    }
    for words in (["a=x"], ["a=-1"], ["a=nan"], ["=2"], ["a", "a=2"]):
        with pytest.raises(InvalidArgument):
            read_weights(words)


def test_surface_of_json(run: Quartet, tmp_path: Path) -> None:
    """One JSON document on stdout, whatever happens."""
    wrong = run("dataset", "validate", "none", "--json")
    assert json.loads(wrong.out)["error"]["reason"] == "REVISION_NOT_FOUND"
