"""What commands print: JSON of protobuf messages, tables, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from services.client.client import Progress
from services.finetune.errors import QuartetError


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON with the proto's field names; 64-bit numbers as numbers."""
    data: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    if message.DESCRIPTOR.file.package == "google.protobuf":
        return data  # Any, Struct and Timestamp have a JSON of their own.
    return {name: _numbers(message, name, value) for name, value in data.items()}


def _numbers(message: Message, name: str, value: Any) -> Any:
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.message_type is None and isinstance(value, str) and field.cpp_type in (2, 4):  # int64, uint64
        return int(value)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        whole = field.message_type.fields_by_name["value"].cpp_type in (2, 4)
        return {key: int(v) for key, v in value.items()} if whole else value
    inner = getattr(message, name)
    if field.message_type is not None and isinstance(value, dict):
        well_known = field.message_type.file.package == "google.protobuf"
        return value if well_known else plain(inner)
    if field.message_type is not None and isinstance(value, list):
        return [plain(item) for item in inner]
    return value


def out(data: Any) -> None:
    """One JSON value on one line."""
    print(json.dumps(data, ensure_ascii=False), flush=True)


def tell(error: QuartetError, as_json: bool) -> int:
    """An error for people on stderr, with `as_json` for programs on stdout too; its exit status."""
    if as_json:
        out({"error": error.to_json()})
    print(f"error: {error.message}", file=sys.stderr)
    shown = error.violations[:20]
    for violation in shown:
        print(f"  {violation.field}: {violation.message}", file=sys.stderr)
    known = len(error.violations) + int(error.metadata.get("violations_left_out", 0))
    more = max(known, int(error.metadata.get("bad_rows", 0))) - len(shown)
    if more > 0:
        print(f"  … and {more} more", file=sys.stderr)
    return error.exit_status


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    made = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    # A pipe is read by programs: there no name is cut to the width of a terminal.
    Console(width=None if sys.stdout.isatty() else 240, highlight=False).print(made)


@contextmanager
def bar(title: str, quiet: bool) -> Iterator[Progress]:
    """A progress bar on stderr, for bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Bar(*columns, console=console, disable=quiet or not console.is_terminal) as shown:
        task = shown.add_task(title, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def event_line(event: Any) -> str:
    """An event for people."""
    kind = event.WhichOneof("event")
    if kind == "state":
        state = type(event.state).DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number[event.state.state].name
        return f"{state}{': ' + event.state.message if event.state.message else ''}"
    if kind == "metric":
        v = event.metric.values
        if "validation_loss" in v:
            return (
                f"step {event.metric.step}  validation loss {v['validation_loss']:.4f}  "
                f"perplexity {v['validation_perplexity']:.2f}"
            )
        more = f"  MFU {v['mfu']:.0%}" if "mfu" in v else ""
        more += f"  {v['peak_memory_bytes'] / 2**30:.1f} GiB" if "peak_memory_bytes" in v else ""
        total, eta = int(v.get("total_steps", 0)), v.get("eta_s", 0.0)
        return (
            f"step {event.metric.step}/{total}  loss {v['loss']:.4f}  lr {v['lr']:.2e}  "
            f"{v['tokens_per_s']:.0f} tok/s{more}  {eta:.0f} s left"
        )
    if kind == "log":
        warning = event.log.level == type(event.log).WARNING
        return f"{'warning: ' if warning else ''}{event.log.text}"
    if kind == "dataset":
        return _dataset_line(event.dataset)
    if kind == "sample":
        return f"step {event.sample.step}  {event.sample.prompt!r} -> {event.sample.answer!r}"
    if kind == "checkpoint":
        return f"checkpoint {event.checkpoint.step}"
    told = getattr(event, kind)
    what = "rows" if "done_rows" in told.DESCRIPTOR.fields_by_name else "bytes"
    return f"{getattr(told, f'done_{what}')} of {getattr(told, f'total_{what}')} {what}"


def _dataset_line(d: Any) -> str:
    told = f"{d.samples} samples of {d.rows} rows in {d.blocks} blocks, {d.fill:.0%} full: {d.tokens} tokens, "
    told += f"{d.learned_tokens} learned"
    parts = {"cut": d.truncated_rows, "dropped": d.dropped_rows, "unreadable": d.skipped_rows}
    told += "".join(f"; {count} rows {what}" for what, count in parts.items() if count)
    return told + (f"; {d.validation_samples} samples to look at" if d.validation_samples else "")
