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
from services.conversion.usecases import JOB, Conversion, Model

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
        self._conversion.delete_model(request.name, request.etag)
        return Empty()

    async def DownloadModel(
        self, request: pb.DownloadModelRequest, context: Any
    ) -> AsyncIterator[pb.DownloadModelResponse]:
        pieces = await asyncio.to_thread(self._conversion.download, request.name, request.path, request.offset_bytes)
        while data := await asyncio.to_thread(next, pieces, b""):
            yield pb.DownloadModelResponse(data=data, crc32c=google_crc32c.value(data))


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
    ref, manifest = model.ref, model.manifest
    return pb.Model(
        name=ref.name,
        display_name=ref.body["display_name"],
        labels=ref.body["labels"],
        kind=pb.Model.Kind.Value(manifest.kind.upper()),
        digest=ref.body["digest"],
        files=[pb.ModelFile(path=f.path, digest=f.digest, size_bytes=f.size) for f in manifest.files],
        parents=[pb.Parent(role=p.role, digest=p.digest, name=p.name) for p in manifest.parents],
        architecture=manifest.meta["architecture"],
        template=manifest.meta["template"],
        generation=wire.to_struct(manifest.meta["generation"]),
        size_bytes=manifest.size,
        create_time=wire.timestamp(ref.body["create_time"]),
        etag=ref.etag,
        source=ref.body.get("source", ""),
        report=wire.to_struct(manifest.meta.get("report", {})),
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
