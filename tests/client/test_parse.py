"""Lines that parse and lines that do not; the closed list itself is test_surface.py."""

from __future__ import annotations

import argparse
import importlib
import sys

import pytest

from services.client.__main__ import main
from services.client.parser import parser

LINES = [
    ("dataset create d a.jsonl b.jsonl --skip-bad-rows", {"files": ["a.jsonl", "b.jsonl"], "skip_bad_rows": True}),
    ("dataset preview d --model m --rows 2", {"rows": 2, "start": 0}),
    ("dataset repeat in.json -n 200 -o out.json", {"n": 200, "output": "out.json"}),
    ("assistant create --name 书生", {"name": "书生", "rows": 400, "plain": False, "seed": 0}),
    ("convert merge b a t", {"max_shard_size": "", "dtype": ""}),
    (
        "train r --base m --data d1 d2 --cfg-options optim.lr=1e-3 schedule.epochs=2",
        {"data": ["d1", "d2"], "cfg_options": ["optim.lr=1e-3", "schedule.epochs=2"], "seed": None},
    ),
    (
        "train ./x_copy.py --deepspeed deepspeed_zero2",
        {"config": "./x_copy.py", "deepspeed": "deepspeed_zero2", "data": []},
    ),
    ("list-cfg -p internlm", {"pattern": "internlm", "seed": False}),
    ("copy-cfg internlm_chat_7b_qlora_oasst1_e3 .", {"directory": "."}),
    ("endpoint create m --adapter a=x --adapter b=y --bits 4", {"adapter": ["a=x", "b=y"], "bits": 4}),
    ("chat m -m hi --temperature 0 --stop-words a b", {"message": "hi", "temperature": 0.0, "stop_words": ["a", "b"]}),
    ("job watch j --after 7 --json --endpoint h:1", {"after": 7, "json": True, "endpoint": "h:1"}),
]

WRONG = [
    "",
    "fly",
    "dataset",
    "dataset create d",
    "dataset repeat in.json -o out",
    "train",
    "copy-cfg r",
    "train r --base m --data d --cfg",
    "chat m --bits 3",
    "model import m --dtype int4",
    "assistant create",
]


def leaves(parser: argparse.ArgumentParser, path: str = "") -> dict[str, argparse.ArgumentParser]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not groups:
        return {path: parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for name, child in groups[0].choices.items():
        found |= leaves(child, f"{path} {name}".strip())
    return found


# Servers become programs of their own before anything is parsed.
VERBS = sorted(set(leaves(parser())) - {"up", "gateway"})


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_function_and_its_help(verb: str) -> None:
    found = leaves(parser())[verb]
    module, _, function = found.get_default("run").partition(":")
    assert callable(getattr(importlib.import_module(f"services.client.{module}"), function))
    assert found.description


@pytest.mark.parametrize(("line", "wanted"), LINES, ids=[line for line, _ in LINES])
def test_lines_parse(line: str, wanted: dict[str, object]) -> None:
    parsed = vars(parser().parse_args(line.split()))
    assert {key: parsed[key] for key in wanted} == wanted


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines_are_usage_errors(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(line.split())
    assert left.value.code == 2
    assert "usage: quartet" in capsys.readouterr().err


def test_up_becomes_a_program_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def execv(path: str, argv: list[str]) -> None:
        calls.append(argv)
        raise SystemExit(0)

    monkeypatch.setattr("os.execv", execv)
    with pytest.raises(SystemExit):
        main(["up", "--port", "0", "--home", "x"])
    assert calls == [[sys.executable, "-m", "services.gateway.up", "--port", "0", "--home", "x"]]
