"""Validations and prepared data as messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from quartet.datasets.v1 import datasets_pb2 as pb

from services.common import wire
from services.common.records import Record
from services.finetune.prepare.images import REASONS


def validation(record: Record, report: Mapping[str, Any] | None) -> pb.Validation:
    """A validation, with its report if there is one."""
    spec = record.body["spec"]
    told = pb.Validation(
        revision=spec["revision"],
        **{k: spec[k] for k in ("model", "template", "system", "max_length")},
        **_life(record),
    )
    if report is not None:
        # A later worker may know to tell more than this service.
        json_format.ParseDict(dict(report), told.report, ignore_unknown_fields=True)
    return told


def prepared(record: Record) -> pb.PreparedDataset:
    """Prepared data; counts and certificate are there once it is."""
    body, spec = record.body, record.body["spec"]
    told = pb.PreparedDataset(
        sources=[pb.PrepareSource(**s) for s in spec["sources"]],
        digest=body.get("digest", ""),
        held_out=spec.get("held_out", 0.0),  # older records have none
        **{k: spec[k] for k in ("model", "template", "system", "max_length", "separate_rows", "seed")},
        **_life(record),
    )
    if "meta" in body:
        told.counts.CopyFrom(_counts(body["meta"]))
        told.certificate.CopyFrom(_certificate(body["meta"]["certificate"]))
    return told


def event(sequence: int, told: Mapping[str, Any]) -> pb.DatasetEvent:
    """An event of either."""
    made = pb.DatasetEvent(sequence=sequence, time=wire.timestamp_of(told["time"]), attempt=told["attempt"])
    kind = told["type"]
    if kind == "state":
        made.state.CopyFrom(pb.StateChange(state=pb.State.Value(told["state"]), message=told["message"]))
    elif kind == "log":
        level = pb.LogLine.Level.Value(told["level"].upper())
        made.log.CopyFrom(pb.LogLine(level=level, text=told["text"]))
    elif kind == "progress":
        made.progress.CopyFrom(pb.RowProgress(done_rows=told["done_rows"], total_rows=told["total_rows"]))
    return made


def _life(record: Record) -> dict[str, Any]:
    body = record.body
    return {
        "name": record.name,
        "state": pb.State.Value(record.state),
        "error": wire.error_status(body.get("error")),
        "progress": pb.RowProgress(**body.get("progress", {})),
        "attempt": body["attempt"],
        "create_time": wire.timestamp(record.create_time),
        "start_time": wire.timestamp(body.get("start_time")),
        "end_time": wire.timestamp(body.get("end_time")),
        "etag": record.etag,
    }


def _counts(meta: Mapping[str, Any]) -> pb.PreparedCounts:
    lengths = zip(meta["lengths"]["edges"], meta["lengths"]["counts"], strict=True)
    return pb.PreparedCounts(
        row_count=meta["rows"],
        block_count=meta["blocks"],
        token_count=meta["tokens"],
        learned_count=meta["learned"],
        truncated_row_count=meta["truncated"],
        dropped_row_count=meta["dropped"],
        fill=meta["fill"],
        lengths=[pb.LengthBucket(least=least, row_count=count) for least, count in lengths if count],
        image_count=meta.get("images", {}).get("count", 0),
        cut_image_count=meta.get("images", {}).get("cut", 0),
        skipped_rows={reason: count for reason, count in meta.get("skipped", {}).items() if reason in REASONS},
    )


def _certificate(certificate: Mapping[str, Any]) -> pb.ParityCertificate:
    return pb.ParityCertificate(
        digest=certificate["digest"],
        tokenizer_digest=certificate["tokenizer"],
        template=certificate["template"]["name"],
        template_digest=certificate["template"]["digest"],
        probes=[
            pb.ParityProbe(name=p["name"], digest=p.get("digest", ""), token_ids=p.get("ids", ()))
            for p in certificate["probes"]
        ],
    )
