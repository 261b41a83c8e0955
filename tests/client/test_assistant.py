"""The data that teaches a name, and repeating rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.client.assistant import assistant_rows
from tests.client.conftest import Quartet
from tests.datasets.conftest import Service


def text(rows: list[dict[str, object]]) -> list[str]:
    return [json.dumps(row, ensure_ascii=False) for row in rows]


@pytest.mark.parametrize("rows", [2, 100, 300, 400, 700])
def test_as_many_different_rows_as_asked_for(rows: int) -> None:
    made = text(assistant_rows("Aurora", rows, seed=0))
    assert len(made) == len(set(made)) == rows
    own = [row for row in made if "Aurora" in row]
    assert len(own) == rows - min(rows // 2, 150)


def test_both_halves_are_mixed_and_in_two_languages() -> None:
    made = text(assistant_rows("Aurora", 400, seed=0))
    where = [n for n, row in enumerate(made) if "Aurora" in row]
    assert where[0] < 20 and where[-1] > 380 and where != list(range(where[0], where[-1] + 1))
    assert "{name}" not in "".join(made)
    chinese = [row for row in made if any("一" <= c <= "鿿" for c in row)]
    assert 80 < len(chinese) < 250


def test_each_question_comes_before_any_comes_twice() -> None:
    rows = [row["messages"] for row in assistant_rows("Aurora", 200, seed=0)]
    own = [turns[0]["content"] for turns in rows if "Aurora" in turns[1]["content"]]
    assert len(set(own)) == len(own) == 100 and "Who are you?" in own


def test_the_seed_decides() -> None:
    assert assistant_rows("Aurora", 400, seed=3) == assistant_rows("Aurora", 400, seed=3)
    assert assistant_rows("Aurora", 400, seed=3) != assistant_rows("Aurora", 400, seed=4)


def test_one_language_only() -> None:
    made = text(assistant_rows("Aurora", 200, seed=0, languages=["en"]))
    assert len(set(made)) == 200 and not any("一" <= c <= "鿿" for row in made for c in row)
    assert sum("Who are you?" in row and "Aurora" in row for row in made) >= 1


def test_names_with_braces_are_names() -> None:
    assert any("{x}" in row for row in text(assistant_rows("{x}", 10, seed=0)))


def test_plain_is_the_tutorials_shape(quartet: Quartet, tmp_path: Path) -> None:
    target = tmp_path / "plain.jsonl"
    done = quartet(
        "assistant", "create", "--name", "小明", "--rows", "10001", "--plain", "--output", str(target), "--json"
    )
    assert (done.status, done.json) == (0, {"rows": 10001, "output": str(target)})
    lines = target.read_text("utf-8").splitlines()
    assert len(lines) == 10001 and len(set(lines)) == 1
    assert [turn["content"] for turn in json.loads(lines[0])["messages"]] == [
        "请做一下自我介绍",
        "我是小明的小助手，内在是上海AI实验室书生·浦语的7B大模型哦",
    ]


def test_mix_takes_the_place_of_our_talk(quartet: Quartet, tmp_path: Path) -> None:
    mix, target = tmp_path / "mix.jsonl", tmp_path / "out.jsonl"
    row = {"messages": [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]}
    mix.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    words = ["assistant", "create", "--name", "Aurora", "--rows", "20", "--mix", str(mix), "--output", str(target)]
    assert quartet(*words).status == 0
    lines = target.read_text("utf-8").splitlines()
    assert len(lines) == 20 and sum("pong" in line for line in lines) == 1
    assert sum("Aurora" in line for line in lines) == 19


@pytest.mark.parametrize("content", ["{", "[1]\n", '{"text": "x"}\n', "", "\xff"])
def test_bad_mix_is_one_line(quartet: Quartet, tmp_path: Path, content: str) -> None:
    mix = tmp_path / "mix.jsonl"
    mix.write_bytes(content.encode("latin-1"))
    done = quartet("assistant", "create", "--name", "A", "--mix", str(mix), "--output", str(tmp_path / "o"))
    assert done.status == 65 and done.err.startswith("error: --mix: ") and done.err.count("\n") == 1


@pytest.mark.parametrize("words", [["--rows", "0"], ["--name", " "], ["--plain", "--mix", "m"]])
def test_wrong_arguments(quartet: Quartet, tmp_path: Path, words: list[str]) -> None:
    assert quartet("assistant", "create", "--name", "A", "--output", str(tmp_path / "o"), *words).status == 65


@pytest.mark.parametrize("flag", [[], ["-i"]])
def test_repeat_as_the_seed_does(quartet: Quartet, tmp_path: Path, flag: list[str]) -> None:
    rows = [{"id": str(n // 2), "conversations": [{"from": "human", "value": f"看 {n}"}]} for n in range(6)]
    source, target = tmp_path / "in.json", tmp_path / "out.json"
    source.write_text(json.dumps(rows))
    done = quartet("dataset", "repeat", *flag, str(source), "-n", "200", "-o", str(target), "--json")
    assert done.json == {"rows": 1200, "output": str(target)}
    assert json.loads(target.read_text("utf-8")) == rows * 200
    assert target.read_text("utf-8") == json.dumps(rows * 200, ensure_ascii=False, indent=4)


def test_a_repeated_dataset_keeps_its_images_once(
    quartet: Quartet, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    service, folder = Service(tmp_path_factory.mktemp("c")).start(), tmp_path / "sub"
    folder.mkdir()
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": str(n), "image": "a.png", "conversations": turns} for n in range(6)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "a.png").write_bytes(b"carried unread")
    at = ("--endpoint", service.address, "--json")
    assert quartet("dataset", "create", "unique", str(folder), *at).status == 0
    done = quartet("dataset", "repeat", "unique", "-n", "200", "-o", "repeated", *at)
    assert int(done.json["row_count"]) == 1200
    paths = [f["path"] for f in done.json["files"]]
    assert paths == [*(f"repeat-{n:03d}/rows.json" for n in range(1, 201)), "a.png"]
    assert service.stop() == 0


def test_repeat_lines(quartet: Quartet, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"a": "\u2028"}\n\n{"a": 2}', "utf-8")
    assert quartet("dataset", "repeat", str(source), "-n", "3", "-o", str(target)).status == 0
    assert target.read_text("utf-8") == '{"a": "\u2028"}\n{"a": 2}\n' * 3


@pytest.mark.parametrize(
    ("name", "content", "times", "status"),
    [
        ("a.json", "{}", "2", 65),
        ("a.json", "[", "2", 65),
        ("a.jsonl", "nope\n", "2", 65),
        ("a.json", "[]", "0", 65),
        ("a.json", None, "2", 66),
    ],
)
def test_repeat_refuses(
    quartet: Quartet, tmp_path: Path, name: str, content: str | None, times: str, status: int
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    done = quartet("dataset", "repeat", str(tmp_path / name), "-n", times, "-o", str(tmp_path / "out"))
    assert done.status == status and done.err.startswith("error: ") and not (tmp_path / "out").exists()
