"""The training room's wire: protos in, use-cases called, protos out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import google_crc32c
from google.protobuf import json_format
from google.protobuf.empty_pb2 import Empty
from quartet.training.v1 import training_pb2 as pb
from quartet.training.v1.training_pb2_grpc import TrainingServicer

from services.common import names, wire, wishes
from services.common.records import Record
from services.finetune.config import to_json
from services.finetune.devices import Device
from services.finetune.recipes import Recipe
from services.finetune.store.artifacts import Ref
from services.training.usecases import JOB, Training

PAGING = ("page_size", "page_token", "filter", "order_by")


class Servicer(TrainingServicer):
    def __init__(self, training: Training) -> None:
        self._training = training

    def ListRecipes(self, request: pb.ListRecipesRequest, context: Any) -> pb.ListRecipesResponse:
        found, token = self._training.list_recipes(**_paging(request))
        return pb.ListRecipesResponse(recipes=[_recipe(r, False) for r in found], next_page_token=token)

    def GetRecipe(self, request: pb.GetRecipeRequest, context: Any) -> pb.Recipe:
        return _recipe(self._training.recipe(request.name), True)

    def CreateTrainingJob(self, request: pb.CreateTrainingJobRequest, context: Any) -> pb.TrainingJob:
        job = request.training_job
        spec = {
            "display_name": job.display_name,
            "recipe": job.recipe,
            "base_model": job.base_model,
            "datasets": list(job.datasets),
            "overrides": wire.from_struct(job.overrides),
            "resume_from": job.resume_from,
            "validation_datasets": list(job.validation_datasets),
            "labels": dict(job.labels),
        }
        asked = (request.request_id, wire.fingerprint(request))
        device = Device(request.device.kind, request.device.memory) if request.HasField("device") else None
        made = self._training.create(
            request.parent, request.training_job_id, spec, asked, request.validate_only, device
        )
        return _job(made)

    def GetTrainingJob(self, request: pb.GetTrainingJobRequest, context: Any) -> pb.TrainingJob:
        names.parse(JOB, request.name)
        return _job(self._training.jobs.get(request.name))

    def ListTrainingJobs(self, request: pb.ListTrainingJobsRequest, context: Any) -> pb.ListTrainingJobsResponse:
        found, token = self._training.jobs.page(request.parent, **_paging(request))
        return pb.ListTrainingJobsResponse(training_jobs=[_job(r) for r in found], next_page_token=token)

    def CancelTrainingJob(self, request: pb.CancelTrainingJobRequest, context: Any) -> pb.TrainingJob:
        names.parse(JOB, request.name)
        return _job(self._training.jobs.cancel(request.name))

    def PauseTrainingJob(self, request: pb.PauseTrainingJobRequest, context: Any) -> pb.TrainingJob:
        return self._ask(request, wishes.pause)

    def ResumeTrainingJob(self, request: pb.ResumeTrainingJobRequest, context: Any) -> pb.TrainingJob:
        return self._ask(request, wishes.resume)

    def _ask(self, request: Any, wish: wishes.Wish) -> pb.TrainingJob:
        names.parse(JOB, request.name)
        asked = f"{type(request).__name__} {wire.fingerprint(request)}"
        return _job(self._training.jobs.ask(request.name, wishes.once(wish, request.request_id, asked)))

    def DeleteTrainingJob(self, request: pb.DeleteTrainingJobRequest, context: Any) -> Empty:
        names.parse(JOB, request.name)
        self._training.delete(request.name, request.etag)
        return Empty()

    async def WatchTrainingJob(
        self, request: pb.WatchTrainingJobRequest, context: Any
    ) -> AsyncIterator[pb.TrainingEvent]:
        names.parse(JOB, request.name)
        async for sequence, event in wire.follow(self._training.jobs.watch(request.name, request.after_sequence)):
            yield _event(sequence, event)

    def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        names.parse(JOB, request.parent, "parent")
        found, token = self._training.checkpoints(request.parent, **_paging(request))
        return pb.ListCheckpointsResponse(checkpoints=[_checkpoint(r) for r in found], next_page_token=token)

    def ListTrainingFiles(self, request: pb.ListTrainingFilesRequest, context: Any) -> pb.ListTrainingFilesResponse:
        names.parse(JOB, request.parent, "parent")
        found, token = self._training.files(request.parent, request.page_size, request.page_token)
        files = [pb.TrainingFile(path=f.path, size_bytes=f.size, digest=f.digest) for f in found]
        return pb.ListTrainingFilesResponse(files=files, next_page_token=token)

    async def DownloadTrainingFile(
        self, request: pb.DownloadTrainingFileRequest, context: Any
    ) -> AsyncIterator[pb.DownloadTrainingFileResponse]:
        names.parse(JOB, request.name)
        what = (request.name, request.path, request.offset_bytes, request.digest)
        pieces = await asyncio.to_thread(self._training.download, *what)
        while data := await asyncio.to_thread(next, pieces, b""):
            yield pb.DownloadTrainingFileResponse(data=data, crc32c=google_crc32c.value(data))


def _paging(request: Any) -> dict[str, Any]:
    return {name: getattr(request, name) for name in PAGING}


def _recipe(recipe: Recipe, whole: bool) -> pb.Recipe:
    return pb.Recipe(
        name=f"recipes/{recipe.name}",
        model=recipe.model,
        dataset=recipe.dataset,
        method=recipe.method,
        checkpoint=recipe.checkpoint,
        tested=recipe.tested,
        since=recipe.since,
        config=wire.to_struct(to_json(recipe.config)) if whole else None,
    )


def _job(record: Record) -> pb.TrainingJob:
    body, spec = record.body, record.body["spec"]
    progress = body.get("progress", {})
    return pb.TrainingJob(
        name=record.name,
        display_name=spec["display_name"],
        recipe=spec["recipe"],
        base_model=spec["base_model"],
        datasets=spec["datasets"],
        validation_datasets=spec.get("validation_datasets", ()),
        overrides=wire.to_struct(spec["overrides"]),
        resume_from=spec["resume_from"],
        labels=spec["labels"],
        state=pb.TrainingJob.State.Value(record.state),
        error=wire.error_status(body.get("error")),
        config=wire.to_struct(spec["run"]["config"]),
        progress=pb.Progress(**{k: v for k, v in progress.items() if k in ("step", "total_steps", "loss", "eta_s")}),
        attempt=body["attempt"],
        result=body.get("result", ""),
        create_time=wire.timestamp(record.create_time),
        start_time=wire.timestamp(body.get("start_time")),
        end_time=wire.timestamp(body.get("end_time")),
        etag=record.etag,
        plan=json_format.ParseDict(body["plan"], pb.Plan()) if "plan" in body else None,
    )


def _checkpoint(ref: Ref) -> pb.Checkpoint:
    body = ref.body
    created = wire.timestamp(body["create_time"])
    return pb.Checkpoint(
        name=ref.name,
        step=body["step"],
        digest=body["digest"],
        loss=body["loss"],
        create_time=created,
        validation_loss=body.get("validation_loss"),
    )


def _event(sequence: int, event: dict[str, Any]) -> pb.TrainingEvent:
    told = pb.TrainingEvent(sequence=sequence, time=wire.timestamp_of(event["time"]), attempt=event["attempt"])
    kind = event["type"]
    if kind == "state":
        told.state.CopyFrom(pb.StateChange(state=pb.TrainingJob.State.Value(event["state"]), message=event["message"]))
    elif kind == "metric":
        told.metric.CopyFrom(pb.Metric(step=event["step"], values=event["values"]))
    elif kind == "log":
        level = pb.LogLine.Level.Value(event["level"].upper())
        told.log.CopyFrom(pb.LogLine(level=level, text=event["text"]))
    elif kind == "sample":
        told.sample.CopyFrom(pb.Sample(step=event["step"], prompt=event["prompt"], answer=event["answer"]))
    elif kind == "checkpoint":
        told.checkpoint.CopyFrom(pb.CheckpointSaved(name=event["name"], step=event["step"], digest=event["digest"]))
    elif kind == "dataset":
        told.dataset.CopyFrom(_dataset(event))
    elif kind == "progress":
        told.prepared.CopyFrom(pb.Prepared(done_rows=event["done_rows"], total_rows=event["total_rows"]))
    return told


_LONGER = {"learned": "learned_tokens", "truncated": "truncated_rows", "dropped": "dropped_rows"} | {
    "skipped": "skipped_rows",
    "validation_learned": "validation_learned_tokens",
}


def _dataset(event: dict[str, Any]) -> pb.DatasetInfo:
    counts = {_LONGER.get(name, name): value for name, value in event.items()}
    return pb.DatasetInfo(**{name: counts[name] for name in pb.DatasetInfo.DESCRIPTOR.fields_by_name if name in counts})
