"""dataset validate, dataset prepare, log-dataset, check-custom-dataset: data looked at before a GPU is taken."""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import groupby
from typing import Any

from quartet.datasets.v1 import datasets_pb2

from services.client.client import Client
from services.client.commands import connect
from services.client.commands.jobs import follow
from services.client.show import out, plain, table
from services.finetune.errors import InvalidArgument

IGNORED = -100
"""XTuner's label of a token that is not learned."""
CHECKED_ROWS = 10


def validate(a: Namespace) -> int:
    with connect(a) as client:
        made = client.validate(a.dataset, a.model, a.template, a.system, a.max_length)
        if a.detach:
            return _detached(made, a.json)
        status = follow(client, made.name, a.json)
        if status:
            return status
        report = client.job(made.name).report
    if not a.json:
        show_report(report)
    return _verdict(report)


def prepare(a: Namespace) -> int:
    how = {k: getattr(a, k) for k in ("template", "system", "max_length", "separate_rows", "seed", "held_out")}
    with connect(a) as client:
        made = client.prepare(read_weights(a.datasets), a.model, **how)
        if a.detach:
            return _detached(made, a.json)
        status = follow(client, made.name, a.json)
        if status or a.json:
            return status
        done = client.job(made.name)
    c = done.counts
    print(f"{done.name}: {c.row_count} rows, {c.block_count} blocks of {done.max_length}, fill {c.fill:.4f}")
    print(
        f"{c.token_count} tokens, {c.learned_count} learned; {c.truncated_row_count} rows cut, {c.dropped_row_count} out"
    )
    return 0


def log_dataset(a: Namespace) -> None:
    with connect(a) as client:
        (row,) = _preview(client, a, a.row, 1)
    shown = stages(row)
    wanted = list(shown) if a.show == "all" else [a.show]
    if a.json:
        out({"file": row.file, "row": row.row, **{name: shown[name] for name in wanted}})
        return
    for name in wanted:
        if len(wanted) > 1:
            print(f"#### {name}")
        print(shown[name])


def check_custom(a: Namespace) -> int:
    """The whole is validated, and the first rows are shown as they become tokens."""
    with connect(a) as client:
        made = client.validate(a.dataset, a.model, a.template, a.system, a.max_length)
        for _ in client.watch(made.name):
            pass
        job = client.job(made.name)
        if job.state != datasets_pb2.SUCCEEDED:
            return follow(client, made.name, a.json)
        revision = client.datasets.GetRevision(datasets_pb2.GetRevisionRequest(name=job.revision))
        good = job.report.row_count
        rows = _preview(client, a, 0, min(CHECKED_ROWS, good)) if good else []
    if a.json:
        looked_at = [{"file": r.file, "row": r.row, **stages(r)} for r in rows]
        out({"revision": plain(revision), "validation": plain(job), "rows": looked_at})
        return _verdict(job.report)
    print(f"{revision.name}: {revision.format} ({revision.format_reason})")
    for row in rows:
        print(f"\n==== {row.file} row {row.row}: {len(row.token_ids)} tokens, {sum(row.loss_mask)} learned")
        for name, value in stages(row).items():
            print(f"#### {name}\n{value}")
    print()
    show_report(job.report)
    status = _verdict(job.report)
    print("the dataset can be trained on" if not status else "the dataset has bad rows", file=sys.stderr)
    return status


def stages(row: datasets_pb2.PreviewRow) -> dict[str, Any]:
    """A row as XTuner's log-dataset shows it: text, masked_text, input_ids, labels."""
    labels = [i if learned else IGNORED for i, learned in zip(row.token_ids, row.loss_mask, strict=True)]
    return {
        "text": "".join(p.text for p in row.pieces),
        "masked_text": _masked(row),
        "input_ids": list(row.token_ids),
        "labels": labels,
    }


def _masked(row: datasets_pb2.PreviewRow) -> str:
    """What is learned, with one mark in place of each token that is not."""
    written = [p for p in row.pieces if p.text]
    learned = iter(["".join(p.text for p in run) for trained, run in groupby(written, lambda p: p.trained) if trained])
    runs = [(trained, len(list(run))) for trained, run in groupby(row.loss_mask)]
    return "".join(next(learned, "") if trained else f"[{IGNORED}]" * count for trained, count in runs)


def read_weights(words: list[str]) -> dict[str, float]:
    """DATASET[=WEIGHT] words. InvalidArgument (ARGUMENT_INVALID)."""
    found: dict[str, float] = {}
    for word in words:
        name, equals, weight = word.partition("=")
        try:
            value = float(weight) if equals else 1.0
        except ValueError:
            value = 0.0
        if not name or name in found or not value > 0:
            raise InvalidArgument(
                f"{word!r} is no DATASET=WEIGHT with a weight above 0, or names a dataset twice",
                reason="ARGUMENT_INVALID",
            )
        found[name] = value
    return found


def show_report(report: datasets_pb2.ValidationReport) -> None:
    """A report for people."""
    table(["what", "rows"], _lines(report))
    if report.HasField("tokens"):
        table(["tokens from", "rows"], [(b.least, b.row_count) for b in report.tokens.lengths])
    for p in report.problems[:20]:
        print(f"{p.file} row {p.row} {p.field}: {p.message}", file=sys.stderr)
    for p in report.tokens.special_rows[:5]:
        print(f"note: {p.file} row {p.row} {p.field}: {p.message}", file=sys.stderr)


def _lines(report: datasets_pb2.ValidationReport) -> list[tuple[str, object]]:
    lines: list[tuple[str, object]] = [("read", report.row_count), ("bad", report.bad_row_count)]
    lines += [(f"  {reason}", count) for reason, count in sorted(report.causes.items())]
    lines += [("that say what another says", report.near_duplicate_count)]
    lines += [("  to the letter", report.exact_duplicate_count)]
    if report.HasField("tokens"):
        t = report.tokens
        lines += [("that would be cut", t.truncated_row_count), ("that would teach nothing", t.dropped_row_count)]
        lines += [("with texts of special tokens, kept as text", t.special_row_count)]
    if report.HasField("images"):
        lines += [("with images", report.images.row_count)]
    return lines


def _preview(client: Client, a: Namespace, start: int, count: int) -> list[datasets_pb2.PreviewRow]:
    request = datasets_pb2.PreviewRowsRequest(
        name=client.revision(a.dataset),
        model=client.name("models", a.model),
        template=a.template,
        start_row=start,
        row_count=count,
        system=a.system,
        max_length=a.max_length,
    )
    return list(client.datasets.PreviewRows(request).rows)


def _verdict(report: datasets_pb2.ValidationReport) -> int:
    """The exit status that a report deserves: rows that cannot be trained on are bad input."""
    nothing = report.HasField("tokens") and report.tokens.dropped_row_count == report.row_count
    return InvalidArgument.exit_status if report.bad_row_count or not report.row_count or nothing else 0


def _detached(job: Any, as_json: bool) -> int:
    out(plain(job)) if as_json else print(f"{job.name}\ncome back with: quartet job watch {job.name}")
    return 0
