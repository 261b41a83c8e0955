"""The conversion room's wire: protos in, use-cases called, protos out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import google_crc32c
from google.protobuf import json_format
from google.protobuf.empty_pb2 import Empty
from quartet.conversion.v1 import conversion_pb2 as pb
from quartet.conversion.v1.conversion_pb2_grpc import ConversionServicer

from services.common import names, wire
from services.common.records import Record
from services.conversion.registry import Lineage, Node
from services.conversion.usecases import JOB, Conversion, Model
from services.finetune.prepare.certificate import META as CERTIFICATE
from services.finetune.prepare.certificate import Certificate
from services.finetune.store import garbage

RUN_CONFIG = "run_config.json"
"""The file of a checkpoint that holds its job's config."""
PAGING = ("page_size", "page_token", "filter", "order_by")


class Servicer(ConversionServicer):
    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion

    def CreateConversionJob(self, request: pb.CreateConversionJobRequest, context: Any) -> pb.ConversionJob:
        job = request.conversion_job
        task = job.WhichOneof("task") or ""
        spec = {
            "display_name": job.display_name,
            "target_model": job.target_model,
            "labels": dict(job.labels),
            "task": task,
            "arguments": _arguments(getattr(job, task)) if task else {},
        }
        asked = (request.request_id, wire.fingerprint(request))
        return _job(
            self._conversion.create(request.parent, request.conversion_job_id, spec, asked, request.validate_only)
        )

    def GetConversionJob(self, request: pb.GetConversionJobRequest, context: Any) -> pb.ConversionJob:
        names.parse(JOB, request.name)
        return _job(self._conversion.jobs.get(request.name))

    def ListConversionJobs(self, request: pb.ListConversionJobsRequest, context: Any) -> pb.ListConversionJobsResponse:
        found, token = self._conversion.jobs.page(request.parent, **_paging(request))
        return pb.ListConversionJobsResponse(conversion_jobs=[_job(r) for r in found], next_page_token=token)

    def CancelConversionJob(self, request: pb.CancelConversionJobRequest, context: Any) -> pb.ConversionJob:
        names.parse(JOB, request.name)
        return _job(self._conversion.jobs.cancel(request.name))

    async def WatchConversionJob(
        self, request: pb.WatchConversionJobRequest, context: Any
    ) -> AsyncIterator[pb.ConversionEvent]:
        names.parse(JOB, request.name)
        async for sequence, event in wire.follow(self._conversion.jobs.watch(request.name, request.after_sequence)):
            yield _event(sequence, event)

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        return _model(self._conversion.get_model(request.name))

    def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        found, token = self._conversion.list_models(request.parent, **_paging(request))
        return pb.ListModelsResponse(models=[_model(m) for m in found], next_page_token=token)

    def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> Empty:
        self._conversion.delete_model(request.name, request.etag, request.force)
        return Empty()

    async def DownloadModel(
        self, request: pb.DownloadModelRequest, context: Any
    ) -> AsyncIterator[pb.DownloadModelResponse]:
        what = (request.name, request.path, request.offset_bytes)
        if request.direct and (url := await asyncio.to_thread(self._conversion.link, *what)):
            yield pb.DownloadModelResponse(url=url)
            return
        pieces = await asyncio.to_thread(self._conversion.download, *what)
        while data := await asyncio.to_thread(next, pieces, b""):
            yield pb.DownloadModelResponse(data=data, crc32c=google_crc32c.value(data))

    def GetLineage(self, request: pb.GetLineageRequest, context: Any) -> pb.Lineage:
        descendants = request.direction == pb.GetLineageRequest.DESCENDANTS
        return _lineage(self._conversion.lineage(request.name, descendants, request.depth))

    async def CollectGarbage(
        self, request: pb.CollectGarbageRequest, context: Any
    ) -> AsyncIterator[pb.CollectGarbageResponse]:
        reports = self._conversion.collect_garbage(request.grace.ToTimedelta().total_seconds(), request.dry_run)
        while (report := await asyncio.to_thread(next, reports, None)) is not None:
            yield _report(report)


def _paging(request: Any) -> dict[str, Any]:
    return {name: getattr(request, name) for name in PAGING}


def _arguments(task: Any) -> dict[str, Any]:
    return {f.name: getattr(task, f.name) for f in task.DESCRIPTOR.fields}


def _job(record: Record) -> pb.ConversionJob:
    body, spec = record.body, record.body["spec"]
    job = pb.ConversionJob(
        name=record.name,
        display_name=spec["display_name"],
        target_model=spec["target_model"],
        labels=spec["labels"],
        state=pb.ConversionJob.State.Value(record.state),
        error=wire.error_status(body.get("error")),
        progress=pb.Progress(**body.get("progress", {})),
        attempt=body["attempt"],
        create_time=wire.timestamp(record.create_time),
        start_time=wire.timestamp(body.get("start_time")),
        end_time=wire.timestamp(body.get("end_time")),
        etag=record.etag,
    )
    given = {k: v for k, v in spec["arguments"].items() if v}
    json_format.ParseDict(given, getattr(job, spec["task"]))
    getattr(job, spec["task"]).SetInParent()
    return job


def _model(model: Model) -> pb.Model:
    ref, manifest, meta = model.ref, model.manifest, model.manifest.meta
    return pb.Model(
        name=ref.name,
        display_name=ref.body["display_name"],
        labels=ref.body["labels"],
        kind=pb.Model.Kind.Value(manifest.kind.upper()),
        digest=ref.body["digest"],
        files=[pb.ModelFile(path=f.path, digest=f.digest, size_bytes=f.size) for f in manifest.files],
        parents=[pb.Parent(role=p.role, digest=p.digest, name=p.name) for p in manifest.parents],
        architecture=meta["architecture"],
        template=meta["template"],
        generation=wire.to_struct(meta["generation"]),
        size_bytes=manifest.size,
        create_time=wire.timestamp(ref.body["create_time"]),
        etag=ref.etag,
        source=ref.body.get("source", ""),
        certificate=_certificate(meta[CERTIFICATE]) if CERTIFICATE in meta else None,
        system=meta.get("system", ""),
        dtype=meta.get("dtype", ""),
        context_length=meta.get("context_length", 0),
        parameter_count=meta.get("parameters", 0),
        base_model=meta.get("base_name", ""),
        report=wire.to_struct(meta["report"]) if "report" in meta else None,
        job=ref.body.get("job", ""),
    )


def _certificate(certificate: Certificate) -> pb.Certificate:
    return pb.Certificate(
        digest=certificate["digest"],
        tokenizer_digest=certificate["tokenizer"],
        template=certificate["template"]["name"],
        template_digest=certificate["template"]["digest"],
    )


def _lineage(lineage: Lineage) -> pb.Lineage:
    edges = [pb.LineageEdge(child=e.child, parent=e.parent, role=e.role, name=e.name) for e in lineage.edges]
    nodes = [_node(n) for n in lineage.nodes]
    return pb.Lineage(start=lineage.start, nodes=nodes, edges=edges, cut=lineage.cut)


def _node(node: Node) -> pb.LineageNode:
    files = node.manifest.files if node.manifest is not None else ()
    return pb.LineageNode(
        id=node.id,
        kind=node.manifest.kind if node.manifest is not None else "endpoint" if "/endpoints/" in node.id else "",
        names=[ref.name for ref in node.refs],
        source=next((ref.body["source"] for ref in node.refs if ref.body.get("source")), ""),
        config_digest=next((f.digest for f in files if f.path == RUN_CONFIG), ""),
        jobs=sorted({ref.body["job"] for ref in node.refs if ref.body.get("job")}),
    )


def _report(report: garbage.Report) -> pb.CollectGarbageResponse:
    def counted(found: garbage.Counted) -> pb.GarbageCount:
        return pb.GarbageCount(count=found.count, size_bytes=found.size)

    return pb.CollectGarbageResponse(
        phase=pb.CollectGarbageResponse.Phase.Value(report.phase),
        artifact_count=report.artifacts,
        live=counted(report.live),
        young=counted(report.young),
        dropped=counted(report.garbage),
        uploads=counted(report.uploads),
        temporary_files=counted(report.temporary),
        prepared=counted(report.prepared),
    )


def _event(sequence: int, event: dict[str, Any]) -> pb.ConversionEvent:
    told = pb.ConversionEvent(sequence=sequence, time=wire.timestamp_of(event["time"]), attempt=event["attempt"])
    kind = event["type"]
    if kind == "state":
        told.state.CopyFrom(
            pb.StateChange(state=pb.ConversionJob.State.Value(event["state"]), message=event["message"])
        )
    elif kind == "log":
        level = pb.LogLine.Level.Value(event["level"].upper())
        told.log.CopyFrom(pb.LogLine(level=level, text=event["text"]))
    elif kind == "progress":
        told.progress.CopyFrom(pb.Progress(done_bytes=event["done_bytes"], total_bytes=event["total_bytes"]))
    return told
