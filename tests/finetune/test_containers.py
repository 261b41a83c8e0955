"""What is wrong in a file is blamed on its row, and the rows around it are read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.finetune.errors import InvalidArgument
from services.finetune.formats import Problem, Row, read_rows, sniff
from services.finetune.formats.containers import raw_rows

GOOD = json.dumps({"instruction": "q", "output": "a"})
Found = list[int | tuple[int, str]]


def found(path: Path, data: str | bytes) -> Found:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    rows = read_rows([(path.name, path)], "alpaca")
    return [(r.row, r.reason) if isinstance(r, Problem) else r.row for r in rows]


JSON: list[tuple[str, Found]] = [
    (f'[{GOOD}, {{"output": NaN}}, {GOOD}]', [1, (2, "JSON_INVALID"), 3]),
    (f'[{GOOD},\n{{"output": "a", "output": "b"}},{GOOD}]', [1, (2, "JSON_INVALID"), 3]),
    (f'[{GOOD}, {{"output": [}}, {GOOD}]', [1, (2, "JSON_INVALID")]),
    (f"[{GOOD}, 7, {GOOD}]", [1, (2, "ROW_NOT_OBJECT"), 3]),
    (f"[{GOOD}, {'[' * 200_000}", [1, (2, "JSON_TOO_DEEP")]),
    (f"[{GOOD}, {GOOD}", [1, 2, (3, "JSON_INVALID")]),
    (f"[{GOOD}] x", [1, (2, "JSON_INVALID")]),
    (f"[{GOOD},]", [1, (2, "JSON_INVALID")]),
    (f"{GOOD}\n{GOOD}", [1, 2]),  # JSON lines with the wrong ending
    (GOOD, [1]),
    ("[]", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "rows"), JSON)
def test_json_blames_the_row(tmp_path: Path, text: str, rows: Found) -> None:
    assert found(tmp_path / "a.json", text) == rows


HEAD = "instruction,output\n"
CSV: list[tuple[str | bytes, Found]] = [
    (f"{HEAD}q,a\n".encode() + b"q,\xe9\nq,a\n", [2, (3, "ENCODING_INVALID"), 4]),
    (HEAD.encode() + b"q,a\0\nq,a\n", [(2, "NUL_BYTE"), 3]),
    (f'{HEAD}q,"a"x\nq,a\n', [(2, "CSV_INVALID"), 3]),
    (f"{HEAD}q,a,b\nq,a\n", [(2, "CSV_COLUMNS"), 3]),
    (f'{HEAD}"q\nq",a\nq\n', [2, (4, "CSV_COLUMNS")]),  # a record is named by its first line
    (f"{HEAD}q,{'a' * 200_000}\n", [2]),
    ("instruction,output,output\nq,a,b\n", [(1, "CSV_HEADER")]),
    (f"{HEAD}q,a\n".encode("utf-16"), [(1, "ENCODING_UTF16")]),
    (f"\ufeff{HEAD}q,a\n", [2]),
    (f'messages\n"{"[" * 200_000}"\n', [(2, "JSON_TOO_DEEP")]),
]


@pytest.mark.parametrize(("data", "rows"), CSV)
def test_csv_blames_the_row(tmp_path: Path, data: str | bytes, rows: Found) -> None:
    assert found(tmp_path / "a.csv", data) == rows


JSONL: list[tuple[bytes, Found]] = [
    (f"{GOOD}\n".encode("utf-16"), [(1, "ENCODING_UTF16")]),
    (f"{GOOD}\n".encode("utf-16-le"), [(1, "NUL_BYTE"), (2, "NUL_BYTE")]),
    (f"{GOOD} {GOOD}\n{GOOD}".encode(), [(1, "JSON_INVALID"), 2]),
    (b'{"n": ' + b"1" * 5000 + b"}\n" + GOOD.encode(), [(1, "JSON_INVALID"), 2]),
]


@pytest.mark.parametrize(("data", "rows"), JSONL)
def test_jsonl_blames_the_row(tmp_path: Path, data: bytes, rows: Found) -> None:
    assert found(tmp_path / "a.jsonl", data) == rows


def test_a_line_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.finetune.formats.containers.MAX_LINE_BYTES", 100)
    data = f'{GOOD}\n{{"x": "{"y" * 500}"}}\n{GOOD}\n'
    assert found(tmp_path / "a.jsonl", data) == [1, (2, "LINE_TOO_LONG"), 3]


def test_a_file_that_is_no_parquet_is_blamed(tmp_path: Path) -> None:
    assert found(tmp_path / "a.parquet", b"PAR1 no") == [(1, "PARQUET_INVALID")]


def test_names_of_strange_fields_can_be_sent(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"\\ud800": 1}')
    with pytest.raises(InvalidArgument) as caught:
        sniff([("a.jsonl", path)])
    assert caught.value.message.encode() and caught.value.reason == "FORMAT_UNDETECTED"


cells = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12)
tables = st.lists(st.tuples(cells, cells), min_size=1, max_size=6)


@given(rows=tables, ending=st.sampled_from(["json", "jsonl", "csv"]))
def test_what_is_written_is_read(
    rows: list[tuple[str, str]], ending: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("f") / f"a.{ending}"
    values = [{"x": x, "y": y} for x, y in rows]
    if ending == "csv":
        out = io.StringIO()
        writer = csv.writer(out, quoting=csv.QUOTE_ALL)
        writer.writerows([("x", "y"), *rows])
        path.write_bytes(out.getvalue().encode())
    else:
        lines = [json.dumps(v, ensure_ascii=False) for v in values]
        path.write_bytes(("[" + ",".join(lines) + "]" if ending == "json" else "\n".join(lines)).encode())
    first = 2 if ending == "csv" else 1
    assert list(raw_rows(path.name, path)) == list(enumerate(values, first))


ASK, SAY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TURN = {"input": "q", "output": "a"}
BAD = [
    ("openai", {"messages": [ASK, {**SAY, "loss": "maybe"}]}, "messages[1].loss", "FIELD_TYPE"),
    ("openai", {"messages": [ASK, {**SAY, "weight": 0}]}, "messages[1].content", "NOTHING_TRAINED"),
    ("openai", {"messages": [{**ASK, "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "PART_UNSUPPORTED"),
    ("openai", {"messages": [ASK, SAY, {"role": "system", "content": "s"}]}, "messages[2].content", "TURN_ORDER"),
    ("openai", {"messages": [ASK, 3]}, "messages[1]", "FIELD_TYPE"),
    ("sharegpt", {"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0].from", "ROLE_UNKNOWN"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}]}, "conversations[0].value", "TURN_ORDER"),
    ("alpaca", {"instruction": "q", "output": "<nooutput>"}, "output", "ANSWER_EMPTY"),
    ("alpaca", {"instruction": "q", "output": "a", "input": "\ud800"}, "input", "TEXT_INVALID"),
    ("alpaca", {"instruction": "q", "output": "a", "system": ["s"]}, "system", "FIELD_TYPE"),
    ("alpaca", {"instruction": "", "output": "a"}, "instruction", "QUESTION_EMPTY"),
    ("default", {"conversation": [{**TURN, "sep": "x"}]}, "conversation[0].sep", "FIELD_UNSUPPORTED"),
    ("default", {"conversation": [{"input": "q"}]}, "conversation[0].output", "FIELD_MISSING"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "field", "reason"), BAD)
def test_bad_rows_of_every_format(tmp_path: Path, format: str, row: object, field: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    (bad,) = read_rows([("a.jsonl", path)], format)
    assert isinstance(bad, Problem) and (bad.field, bad.reason) == (field, reason)
    assert bad.message.encode()


def test_answers_may_be_left_unlearned_and_systems_stand_beside(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path.write_text(json.dumps({"system": "s", "conversations": turns}))
    (row,) = read_rows([("a.jsonl", path)], "sharegpt")
    assert isinstance(row, Row) and row.conversation.messages[0].content == "s"
    path.write_text(json.dumps({"conversation": [{**TURN, "output_with_loss": False}, TURN]}))
    (row,) = read_rows([("a.jsonl", path)], "default")
    assert isinstance(row, Row) and [m.trained for m in row.conversation.messages] == [True, False, True, True]
