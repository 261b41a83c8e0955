"""What is wrong in a file is blamed on its row, and the rows around it are read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from services.finetune.errors import InvalidArgument
from services.finetune.formats import Problem, Row, read_rows, sniff
from services.finetune.formats.containers import is_row_file, raw_rows
from services.finetune.formats.json_rows import json_rows

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
    (",".join(f"c{n}" for n in range(1_000_000)) + "\nx\n", [(1, "CSV_HEADER")]),
    ("instruction,output\r\nq,a\r\n", [2]),
    ("instruction,output\n", []),
    ('instruction,output\n"=1+1",a\n', [2]),  # a formula is text
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


TSV: list[tuple[str, Found]] = [
    ('instruction\toutput\n"q\tq"\ta,b\nq\n', [2, (3, "CSV_COLUMNS")]),
    ("instruction\tinstruction\n", [(1, "CSV_HEADER")]),
]


@pytest.mark.parametrize(("data", "rows"), TSV)
def test_tsv_blames_the_row(tmp_path: Path, data: str, rows: Found) -> None:
    assert found(tmp_path / "a.tsv", data) == rows


def zstd(data: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(data).to_pybytes()
    return packed


LINES = f"{GOOD}\n".encode() * 5000
PACKED: list[tuple[str, bytes, Found]] = [
    ("a.jsonl.gz", gzip.compress(f"{GOOD}\n[]\n{GOOD}".encode()), [1, (2, "ROW_NOT_OBJECT"), 3]),
    ("a.csv.gz", gzip.compress(f"{HEAD}q,a\n".encode()), [2]),
    ("a.json.zst", zstd(f"[{GOOD}]".encode()), [1]),
    ("a.json.gz", gzip.compress(f"{GOOD}\n{GOOD}".encode()), [1, 2]),
    ("a.jsonl.zst", zstd(f"{GOOD}\n".encode()), [1]),
    ("a.jsonl.gz", gzip.compress(GOOD.encode()) * 2, [(1, "JSON_INVALID")]),  # two streams are one text
    ("a.jsonl.gz", b"", []),
    ("a.jsonl.gz", LINES, [(1, "GZIP_INVALID")]),
    ("a.jsonl.zst", LINES, [(1, "ZSTD_INVALID")]),
    ("a.jsonl.gz", gzip.compress(LINES)[:20], [(1, "GZIP_INVALID")]),
    ("a.jsonl.zst", zstd(LINES)[:20], [(1, "ZSTD_INVALID")]),
]


@pytest.mark.parametrize(("name", "data", "rows"), PACKED)
def test_packed_text_blames_the_row(tmp_path: Path, name: str, data: bytes, rows: Found) -> None:
    assert found(tmp_path / name, data) == rows


def test_a_cut_stream_gives_the_rows_before_the_cut(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"instruction": f"{n:x}" * 9, "output": "a"}).encode() + b"\n" for n in range(9999))
    for name, packed in (("a.jsonl.gz", gzip.compress(lines)), ("a.jsonl.zst", zstd(lines))):
        got = found(tmp_path / name, packed[: len(packed) // 2])
        assert got[:-1] == list(range(1, len(got))) and len(got) > 1000
        assert got[-1] in ((len(got), "GZIP_INVALID"), (len(got), "ZSTD_INVALID"))


def test_a_stream_that_unpacks_without_end_is_stopped(tmp_path: Path) -> None:
    bomb = gzip.compress(b"x" * (100 << 20), 1)
    tracemalloc.start()
    assert found(tmp_path / "a.jsonl.gz", bomb) == [(1, "FILE_TOO_LARGE")]
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def table(count: int) -> pyarrow.Table:
    return pyarrow.Table.from_pylist([{"instruction": f"q{n}", "output": "a"} for n in range(count)])


def arrow(count: int, file: bool, rows: int = 1000) -> bytes:
    sink = pyarrow.BufferOutputStream()
    new = pyarrow.ipc.new_file if file else pyarrow.ipc.new_stream
    with new(sink, table(count).schema) as out:
        out.write_table(table(count), max_chunksize=rows)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def parquet_bytes(count: int) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table(count), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.arrow", arrow(2500, file=True)),
        ("a.arrow", arrow(2500, file=False)),
        ("a.ipc", arrow(2500, file=True, rows=2500)),
        ("a.parquet", parquet_bytes(2500)),
    ],
)
def test_columns_are_rows(tmp_path: Path, name: str, data: bytes) -> None:
    assert found(tmp_path / name, data) == list(range(1, 2501))


def test_damaged_columns_give_what_is_before_the_damage(tmp_path: Path) -> None:
    cut = arrow(2500, file=False)
    assert found(tmp_path / "a.arrow", cut[: int(len(cut) * 0.6)]) == [*range(1, 1001), (1001, "ARROW_INVALID")]
    for name, data in (("a.arrow", arrow(5, file=True)[:-9]), ("b.arrow", b""), ("c.feather", b"ARROW1xx" * 9)):
        assert found(tmp_path / name, data) == [(1, "ARROW_INVALID")]
    assert found(tmp_path / "a.parquet", parquet_bytes(2500)[:-50]) == [(1, "PARQUET_INVALID")]


def test_a_parquet_footer_that_lies_about_its_rows_is_blamed(tmp_path: Path) -> None:
    data = parquet_bytes(70)
    # Thrift writes the number 70 as the zigzag byte 140, 1; the footer's own count comes first.
    (length,) = struct.unpack("<I", data[-8:-4])
    footer = data[-8 - length : -8]
    assert footer.count(b"\x16\x8c\x01") > 1
    lying = data[: -8 - length] + footer.replace(b"\x16\x8c\x01", b"\x16\x8e\x01", 1) + data[-8:]
    got = found(tmp_path / "a.parquet", lying)
    assert isinstance(got[-1], tuple) and got[-1][1] == "PARQUET_INVALID"


@given(
    cut=st.integers(0, 100_000), turned=st.integers(0, 100_000), kind=st.sampled_from(["parquet", "arrow", "stream"])
)
@settings(deadline=None, max_examples=60)
def test_damage_anywhere_is_a_problem_and_no_accident(
    cut: int, turned: int, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = {"parquet": parquet_bytes(50), "arrow": arrow(50, file=True), "stream": arrow(50, file=False)}[kind]
    at = turned % len(data)
    spoiled = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 : cut % len(data) + 1000]
    path = tmp_path_factory.mktemp("f") / ("a.parquet" if kind == "parquet" else "a.arrow")
    path.write_bytes(spoiled)
    assert len(list(raw_rows(path.name, path))) <= 51


@pytest.mark.parametrize(
    ("name", "rows"),
    [("a.jsonl", True), ("a/b.CSV", True), ("a.json.gz", True), ("a.parquet.gz", False), ("a.gz", False), ("jsonl", False),
     (".json", False), ("a.png", False), ("x/dataset_info.json", False), ("a.zip", False)],
)  # fmt: skip
def test_names_tell_which_files_hold_rows(name: str, rows: bool) -> None:
    assert is_row_file(name) == rows


def test_what_is_carried_beside_rows_is_passed_over(tmp_path: Path) -> None:
    for name, text in (("a.png", "no picture"), ("b.jsonl", GOOD), ("dataset_info.json", "{}")):
        (tmp_path / name).write_text(text)
    files = [(name, tmp_path / name) for name in ("a.png", "b.jsonl", "dataset_info.json")]
    assert [(r.file, r.row) for r in read_rows(files, "alpaca")] == [("b.jsonl", 1)]


def test_a_line_too_long_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.finetune.formats.text.MAX_LINE_BYTES", 100)
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


@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=4),
            st.recursive(
                st.none() | st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=4,
            ),
            max_size=3,
        ),
        max_size=8,
    ),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_an_array_cut_anywhere_is_what_json_reads(
    rows: list[Any], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    data = json.dumps(rows, indent=indent, ensure_ascii=ascii_only).encode()
    with mock.patch("services.finetune.formats.json_rows.CHUNK_BYTES", chunk):
        assert [r for _, r in json_rows("a.json", io.BytesIO(data))] == rows  # type: ignore[misc]  # no Problem


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_what_is_wrong_is_told_where_it_is_wherever_an_array_is_cut(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.finetune.formats.json_rows.CHUNK_BYTES", chunk)

    def told(data: bytes) -> list[Any]:
        raws = json_rows("a.json", io.BytesIO(data))
        return [(r.row, r.reason, r.message) if isinstance(r, Problem) else r[0] for r in raws]

    assert told(b'[{"a": 1},\n {"b": x}]') == [
        1, (2, "JSON_INVALID", "broken JSON at line 2, column 8: Expecting value; mend the row")
    ]  # fmt: skip
    assert told(b'[{"a": "\xc3\xbc"},\n {"b": "\xe9"}]')[1][1:] == (
        "ENCODING_INVALID", "byte 23 (line 2) is not UTF-8, as in a Latin-1 file; save the file as UTF-8"
    )  # fmt: skip
    assert told(b'[{"a": 1}, {"b": "\0"}]')[1][:2] == (2, "NUL_BYTE")
    assert told(b'{"a": 1}\n{"a": 2}') == [1, 2]


def test_a_long_array_takes_the_memory_of_its_longest_row(tmp_path: Path) -> None:
    path, rows = tmp_path / "a.json", 300
    with path.open("w") as file:
        file.write("[")
        for n in range(rows):
            file.write("," * (n > 0) + json.dumps({"instruction": "q" * 300_000, "output": str(n)}))
        file.write("]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in raw_rows("a.json", path)) == rows
        assert tracemalloc.get_traced_memory()[1] < 40e6 < path.stat().st_size
    finally:
        tracemalloc.stop()


def test_a_row_without_end_is_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.finetune.formats.json_rows.MAX_LINE_BYTES", 100)
    monkeypatch.setattr("services.finetune.formats.json_rows.CHUNK_BYTES", 40)
    assert found(tmp_path / "a.json", f'[{GOOD}, {{"x": "{"y" * 500}"}}, {GOOD}]') == [1, (2, "LINE_TOO_LONG")]
