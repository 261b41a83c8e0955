"""Files to raw rows: JSON Lines, a JSON array, CSV, TSV, Parquet, Arrow; text also behind gzip or zstd. Rows stream.

What is wrong with one row never hides the next, as long as it can be told where the next one begins.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

from services.finetune.errors import InvalidArgument
from services.finetune.formats import Problem
from services.finetune.formats.json_rows import json_rows, jsonl_rows, whole
from services.finetune.formats.text import MAX_LINE_BYTES, Raw, Spoiled, lines_of
from services.finetune.formats.unpacking import PACKED, PackedError, open_packed

MAX_COLUMNS = 10_000
BATCH_ROWS = 1024
ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
"""What Hugging Face's library writes beside rows, about them."""


def raw_rows(file: str, path: Path) -> Iterator[Raw]:
    """(row number, fields) of each row, or a Problem. The ending of `file` tells the container.

    Raises InvalidArgument (FORMAT_UNDETECTED) for another ending.
    """
    kind, packed = _kind(file)
    if kind in _TEXT:
        return _packed_text(file, path, kind, packed)
    if kind in _COLUMNS and not packed:
        return _columns(file, path, _COLUMNS[kind])
    ending = file.rpartition("/")[2].partition(".")[2] or file
    raise InvalidArgument(f"{file}: cannot read .{ending} files; use {ENDINGS}", reason="FORMAT_UNDETECTED")


def is_row_file(file: str) -> bool:
    """Whether `raw_rows` reads a file of this name; any other is carried beside the rows, as images are."""
    kind, packed = _kind(file)
    if file.rpartition("/")[2] in ABOUT:
        return False
    return kind in _TEXT or (kind in _COLUMNS and not packed)


def _kind(file: str) -> tuple[str, str]:
    """(ending, compression or "") of a file's name: a.jsonl.gz -> ("jsonl", "gz")."""
    name, _, ending = file.rpartition("/")[2].lower().rpartition(".")
    return (name.rpartition(".")[2], ending) if ending in PACKED and "." in name else (ending if name else "", "")


def _packed_text(file: str, path: Path, kind: str, packed: str) -> Iterator[Raw]:
    """The rows of a text file; what is wrong with its compression is blamed on the row where it is met."""
    number = 0
    try:
        with open_packed(path, packed) as source:
            for raw in _TEXT[kind](file, source):
                number = raw.row if isinstance(raw, Problem) else raw[0]
                yield raw
    except PackedError as error:
        yield Problem(file, number + 1, "", error.reason, error.message)


# ---- CSV ----


_JSON_COLUMNS = ("messages", "conversations", "conversation", "tools", "history", "images")


class _CsvLines:
    """Lines for csv.reader. A generator would end at its first error; this goes on with the next line."""

    def __init__(self, file: str, source: BinaryIO) -> None:
        self.number = 0
        self._lines = lines_of(file, source)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        self.number, text = next(self._lines)
        if isinstance(text, Problem):
            raise Spoiled(text)
        return text


def _csv(file: str, source: BinaryIO, delimiter: str = ",") -> Iterator[Raw]:
    csv.field_size_limit(MAX_LINE_BYTES)  # the default, 128 KiB, is less than a long text
    header: list[str] = []
    lines = _CsvLines(file, source)
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    while True:
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except Spoiled as error:
            yield error.problem
            continue
        except csv.Error as error:
            yield Problem(file, start, "", "CSV_INVALID", f"broken CSV: {error}; mend the quotes of this row")
            continue
        if cells and header:
            yield _csv_row(file, start, header, cells)
        elif cells:
            header = cells
            if wrong := _header_problem(file, start, header):
                yield wrong
                return


def _header_problem(file: str, row: int, header: list[str]) -> Problem | None:
    if len(header) > MAX_COLUMNS:
        message = f"the header names {len(header)} columns; {MAX_COLUMNS} are read at most: is the line break missing?"
        return Problem(file, row, "", "CSV_HEADER", message)
    twice = min((name for name, count in Counter(header).items() if count > 1), default=None)
    if twice is None:
        return None
    return Problem(file, row, twice[:40], "CSV_HEADER", f"the header names {twice[:40]!r} twice; rename one")


def _csv_row(file: str, number: int, header: list[str], cells: list[str]) -> Raw:
    if len(cells) != len(header):
        message = f"{len(cells)} cells, but the header names {len(header)}; quote cells that hold commas"
        return Problem(file, number, "", "CSV_COLUMNS", message)
    row: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        row[name] = cell
        # XTuner's msagent_react has lists as Python writes them; its format reads them itself.
        if cell[:1] == "[" and cell[:3] != "[{'" and name in _JSON_COLUMNS:
            row[name] = whole(file, number, cell)
            if isinstance(row[name], Problem):
                found: Problem = row[name]
                return Problem(file, number, name, found.reason, f"in the cell {name}: {found.message}")
    return number, row


# ---- columns ----


def _columns(file: str, path: Path, batches: Callable[[Path], Iterator[Any]]) -> Iterator[Raw]:
    """Rows of a columnar file. A damaged one gives the rows before the damage, then one Problem."""
    import pyarrow

    number = 0
    try:
        for batch in batches(path):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    # ArrowException is a base of none of the last two, which damaged offsets and absurd sizes raise.
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        name = "Parquet" if file.lower().endswith(".parquet") else "Arrow"
        message = f"the {name} file cannot be read from here: {text}; write it again"
        reason = f"{name.upper()}_INVALID"
        yield Problem(file, number + 1, "", reason, message)


def _parquet(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as table:
        _check_columns(table.schema_arrow)
        told, found = table.metadata.num_rows, 0
        for batch in table.iter_batches(batch_size=BATCH_ROWS):
            found += batch.num_rows
            yield batch
    if found != told:
        raise ValueError(f"its footer tells of {told} rows, but it holds {found}")


def _arrow(path: Path) -> Iterator[Any]:
    """Both of Arrow's layouts: the file with a footer (Feather too), and the stream, which `datasets` writes."""
    import pyarrow

    # Mapped, so that a batch of gigabytes costs no memory of its own.
    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        _check_columns(reader.schema)
        whole = (reader.get_batch(n) for n in range(reader.num_record_batches)) if is_file else iter(reader)
        for batch in whole:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS)


def _check_columns(schema: Any) -> None:
    """ValueError for more columns than a row may have, or two of one name (a row is a mapping)."""
    if len(schema.names) > MAX_COLUMNS:
        raise ValueError(f"it has {len(schema.names)} columns, and {MAX_COLUMNS} are read at most")
    if len(set(schema.names)) != len(schema.names):
        raise ValueError("two of its columns have one name")


_TEXT: Mapping[str, Callable[[str, BinaryIO], Iterator[Raw]]] = {
    "jsonl": jsonl_rows,
    "ndjson": jsonl_rows,
    "json": json_rows,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
}
_COLUMNS = {"parquet": _parquet, "arrow": _arrow, "ipc": _arrow, "feather": _arrow}

ENDINGS = ".jsonl, .json, .csv, .tsv (with .gz or .zst behind it too), .parquet or .arrow"
