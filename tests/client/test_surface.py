"""The command line is a closed list: a verb or option that is not here does not exist; changing it is a decision."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from services.client.assistant import assistant_rows, plain_rows, unique
from services.client.commands import short_name
from services.client.commands.models import read_size
from services.client.configs import read_options
from services.client.parser import parser
from services.finetune.errors import InvalidArgument

SURFACE = Path(__file__).with_name("surface.txt")


def surface(p: argparse.ArgumentParser, verb: str = "") -> list[str]:
    groups = [a for a in p._actions if isinstance(a, argparse._SubParsersAction)]
    if groups:
        return [line for g in groups for name, child in g.choices.items() for line in surface(child, f"{verb} {name}")]
    options = [a for a in p._actions if not isinstance(a, argparse._HelpAction)]
    return [" ".join([verb.strip(), *(o for a in options for o in (a.option_strings or [a.dest.upper()]))])]


def test_verbs_and_options_are_these() -> None:
    assert surface(parser()) == SURFACE.read_text().splitlines()


def test_the_tutorials_shape() -> None:
    rows = plain_rows("小明", 10001)
    assert len(rows) == 10001 and len(unique(rows)) == 1
    assert rows[0]["messages"][0] == {"role": "user", "content": "请做一下自我介绍"}
    assert rows[0]["messages"][1]["content"].startswith("我是小明的小助手")


def test_assistant_rows_differ_mix_and_repeat() -> None:
    rows = assistant_rows("Nova", 200, seed=1)
    assert rows == assistant_rows("Nova", 200, seed=1) != assistant_rows("Nova", 200, seed=2)
    assert len(unique(rows)) == len(rows) == 200
    own = sum("Nova" in row["messages"][1]["content"] for row in rows)
    assert 100 <= own < 150


@pytest.mark.parametrize(("text", "size"), [("2GB", 2 * 10**9), ("500MB", 5 * 10**8), ("1GiB", 2**30), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2XB"])
def test_senseless_sizes(text: str) -> None:
    with pytest.raises(InvalidArgument):
        read_size(text)


def test_options_are_json_or_text() -> None:
    assert read_options(["optim.lr=1e-3", "data.pack=false", "data.template=chatml", 'lora.targets=["q_proj"]']) == {
        "optim.lr": 1e-3,
        "data.pack": False,
        "data.template": "chatml",
        "lora.targets": ["q_proj"],
    }
    with pytest.raises(InvalidArgument):
        read_options(["optim.lr"])


def test_names_are_made_of_file_names() -> None:
    assert short_name("SmolLM2-135M-Instruct.Q4_1") == "smollm2-135m-instruct-q4-1"
    assert short_name("7B") == "m-7b" and short_name("小明") == ""
