"""One object for all four services: stubs with retries, our error classes, and the few flows that are more than one rpc."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
from quartet.conversion.v1 import conversion_pb2
from quartet.conversion.v1.conversion_pb2_grpc import ConversionStub
from quartet.datasets.v1 import datasets_pb2
from quartet.datasets.v1.datasets_pb2_grpc import DatasetsStub
from quartet.inference.v1 import inference_pb2
from quartet.inference.v1.inference_pb2_grpc import InferenceStub
from quartet.training.v1 import training_pb2
from quartet.training.v1.training_pb2_grpc import TrainingStub

from services.client.retry import RETRIES, Room, credentials, pause_s
from services.common import auth
from services.common.settings import Settings
from services.common.status import CHANNEL_OPTIONS, from_status
from services.finetune.errors import Aborted, QuartetError, Unavailable
from services.finetune.formats import DETECTED, Reading

T = TypeVar("T")

DEFAULT_ENDPOINT = "127.0.0.1:50050"
ROOMS = {"datasets": DatasetsStub, "training": TrainingStub, "conversion": ConversionStub, "inference": InferenceStub}
JOBS: Mapping[str, tuple[str, Any, str]] = {
    "trainingJobs": ("training", training_pb2, "TrainingJob"),
    "conversionJobs": ("conversion", conversion_pb2, "ConversionJob"),
    "preparedDatasets": ("datasets", datasets_pb2, "PreparedDataset"),
    "validations": ("datasets", datasets_pb2, "Validation"),
}
"""What lives like a job, by the word in its name: the room, its messages, and the resource in its rpcs' names."""
OPTIONS = [
    *CHANNEL_OPTIONS,
    ("grpc.keepalive_time_ms", 30_000),
    # A name may stand for several replicas (a headless Service): calls go in turn to those that say that they serve.
    (
        "grpc.service_config",
        json.dumps({"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}),
    ),
    # Replicas are replaced within seconds: addresses are asked for, and connections tried, as often as calls are.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

Progress = Callable[[int, int], None]
"""Called with (done, total) bytes."""


class Client:
    """`datasets`, `training`, `conversion` and `inference` hold one method an rpc: ``client.training.GetRecipe(...)``.

    Unary rpcs are tried again while the service is UNAVAILABLE; creations carry a request_id, so trying again is safe.
    Every failure is a class of services.finetune.errors.
    """

    def __init__(
        self,
        endpoint: str = "",
        token_file: str = "",
        workspace: str = "default",
        *,
        tls_ca: str = "",
        tls_cert: str = "",
        tls_key: str = "",
    ) -> None:
        """What is left out comes from QUARTET_* variables; an `endpoint` given here holds for all four services.

        FailedPrecondition (TOKEN_FILE_UNREADABLE), InvalidArgument (TLS_FILES_INVALID).
        """
        self.endpoint = endpoint or os.environ.get("QUARTET_ENDPOINT", "") or DEFAULT_ENDPOINT
        self._given = bool(endpoint)
        self.credentials = credentials(tls_ca, tls_cert, tls_key)
        self.parent = f"workspaces/{workspace}"
        token_file = token_file or os.environ.get("QUARTET_TOKEN_FILE", "")
        self.metadata = auth.bearer(auth.read_token(token_file)) if token_file else ()
        self._channels: dict[str, grpc.Channel] = {}
        self.datasets = self._room("datasets")
        self.training = self._room("training")
        self.conversion = self._room("conversion")
        self.inference = self._room("inference")

    def close(self) -> None:
        for channel in self._channels.values():
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _room(self, room: str) -> Any:
        address = self.address(room)
        if address not in self._channels:
            target = "ipv4:" + address if "," in address else address
            self._channels[address] = (
                grpc.secure_channel(target, self.credentials, OPTIONS)
                if self.credentials
                else grpc.insecure_channel(target, OPTIONS)
            )
        return Room(ROOMS[room](self._channels[address]), self.metadata, address)

    def address(self, room: str) -> str:
        """Where a service is: the endpoint given to this client, QUARTET_<ROOM>_ENDPOINT, or the common one. Replicas
        without a common name are listed: 10.0.0.1:50051,10.0.0.2:50051."""
        own = "" if self._given else os.environ.get(f"QUARTET_{room.upper()}_ENDPOINT", "")
        return own or self.endpoint

    def is_local(self, room: str) -> bool:
        """Whether a service listens on this machine only, so that paths may mean the same to both."""
        address = self.address(room)
        if address.startswith("unix:"):
            return True
        return all(Settings(host=one.rpartition(":")[0].strip("[]")).loopback for one in address.split(","))

    def name(self, kind: str, text: str) -> str:
        """A full resource name from a short one: name("models", "smollm2")."""
        return text if text.startswith("workspaces/") else f"{self.parent}/{kind}/{text}"

    def revision(self, dataset: str) -> str:
        """A revision's full name from a dataset's (its newest), or from `dataset/revisions/id`."""
        name = self.name("datasets", dataset)
        return name if "/revisions/" in name else f"{name}/revisions/latest"

    # ------------------------------------------------------------------------------------------ datasets

    def upload_dataset(
        self,
        dataset: str,
        files: Sequence[Path],
        reading: Reading = DETECTED,
        told: Progress = lambda done, total: None,
        beside: Sequence[tuple[str, Path]] = (),
    ) -> datasets_pb2.Revision:
        """Make the dataset if need be, send what the store lacks of these files and folders, and commit a revision. `beside`
        are further files, each with its path in the revision.

        NotFound (FILE_NOT_FOUND), InvalidArgument (PATH_UNSAFE) before anything is sent.
        """
        from services.client.upload import files_of, upload_all

        listed = [*files_of(files), *beside]
        name = self._ensure_dataset(dataset)
        return self.commit_files(name, upload_all(self, name, listed, told), reading)

    def import_dataset(
        self,
        dataset: str,
        source: Mapping[str, str],
        include: Sequence[str] = (),
        reading: Reading = DETECTED,
        told: Progress = lambda done, total: None,
    ) -> datasets_pb2.Revision:
        """A revision of files that the service fetches itself: {"hub_id": …}, {"s3_uri": …} or {"directory": …}."""
        name = self._ensure_dataset(dataset)
        request = datasets_pb2.ImportFilesRequest(parent=name, include=include, **source)
        entries: list[datasets_pb2.RevisionFile] = []
        for step in self.datasets.ImportFiles(request):
            entries += [datasets_pb2.RevisionFile(path=f.path, digest=f.digest) for f in step.files]
            told(step.done_bytes, step.total_bytes)
        return self.commit_files(name, entries, reading)

    def commit_files(
        self, dataset: str, files: Sequence[datasets_pb2.RevisionFile], reading: Reading
    ) -> datasets_pb2.Revision:
        """Make the dataset if need be, and a revision of files that the store has already."""
        bad = datasets_pb2.CommitRevisionRequest
        request = datasets_pb2.CommitRevisionRequest(
            parent=self._ensure_dataset(dataset),
            files=files,
            format=reading.format,
            columns=reading.columns,
            bad_rows=bad.BAD_ROWS_SKIP if reading.skip_bad_rows else bad.BAD_ROWS_REJECT,
            request_id=str(uuid.uuid4()),
        )
        revision: datasets_pb2.Revision = self.datasets.CommitRevision(request)
        return revision

    def _ensure_dataset(self, dataset: str) -> str:
        name = self.name("datasets", dataset)
        try:
            self.datasets.GetDataset(datasets_pb2.GetDatasetRequest(name=name))
        except QuartetError as error:
            if error.reason != "DATASET_NOT_FOUND":
                raise
            parent, _, dataset_id = name.rpartition("/datasets/")
            wanted = datasets_pb2.CreateDatasetRequest(
                parent=parent, dataset_id=dataset_id, request_id=str(uuid.uuid4())
            )
            self.datasets.CreateDataset(wanted)
        return name

    def upload_file(self, dataset: str, path: Path, told: Progress = lambda done, total: None, digest: str = "") -> str:
        """Send one file's bytes, going on after cuts; its digest, computed unless it is given."""
        from services.client.upload import send_file

        return send_file(self, dataset, path, told, digest)

    # ------------------------------------------------------------------------------------------ jobs

    def convert(self, target: str, **task: Any) -> conversion_pb2.ConversionJob:
        """Queue a conversion: convert("m", import_model=ImportTask(...)), adapter=… or merge=…."""
        job = conversion_pb2.ConversionJob(target_model=self.name("models", target), **task)
        request = conversion_pb2.CreateConversionJobRequest(
            parent=self.parent, conversion_job=job, request_id=str(uuid.uuid4())
        )
        made: conversion_pb2.ConversionJob = self.conversion.CreateConversionJob(request)
        return made

    def train(
        self, recipe: str, base: str, datasets: Sequence[str], overrides: Mapping[str, Any], **more: Any
    ) -> training_pb2.TrainingJob:
        """Queue a training job, or with `validate_only` plan it, for a `device` if given; `more` are further fields of
        TrainingJob, and job_id.

        An empty `recipe` starts from the defaults; an empty `base` is found by the config's model.checkpoint.
        """
        job_id, dry, device = more.pop("job_id", ""), more.pop("validate_only", False), more.pop("device", None)
        revisions = [self.revision(d) for d in datasets]
        base = base and self.name("models", base)
        job = training_pb2.TrainingJob(recipe=recipe, base_model=base, datasets=revisions, **more)
        job.overrides.update(dict(overrides))
        request = training_pb2.CreateTrainingJobRequest(
            parent=self.parent,
            training_job_id=job_id,
            training_job=job,
            request_id=str(uuid.uuid4()),
            validate_only=dry,
            device=device,
        )
        made: training_pb2.TrainingJob = self.training.CreateTrainingJob(request)
        return made

    def validate(
        self, dataset: str, model: str = "", template: str = "", system: str = "", max_length: int = 0
    ) -> datasets_pb2.Validation:
        """Queue a look at every row of a dataset's newest revision, or of a revision."""
        request = datasets_pb2.ValidateRevisionRequest(
            name=self.revision(dataset),
            model=self.name("models", model) if model else "",
            template=template,
            system=system,
            max_length=max_length,
            request_id=str(uuid.uuid4()),
        )
        made: datasets_pb2.Validation = self.datasets.ValidateRevision(request)
        return made

    def prepare(self, datasets: Mapping[str, float], model: str, **how: Any) -> datasets_pb2.PreparedDataset:
        """Tokenise and pack datasets by their weights; `how` are further fields of PrepareDatasetRequest."""
        sources = [datasets_pb2.PrepareSource(revision=self.revision(d), weight=w) for d, w in datasets.items()]
        request = datasets_pb2.PrepareDatasetRequest(
            parent=self.parent, sources=sources, model=self.name("models", model), request_id=str(uuid.uuid4()), **how
        )
        made: datasets_pb2.PreparedDataset = self.datasets.PrepareDataset(request)
        return made

    def job(self, name: str) -> Any:
        """A job by its full name, or a training or conversion job by its short one; training jobs are looked for first."""
        try:
            return self._job("Get", self.name("trainingJobs", name))
        except QuartetError as error:
            if error.reason != "JOB_NOT_FOUND" or name.startswith("workspaces/"):
                raise
            short = error
        try:
            return self._job("Get", self.name("conversionJobs", name))
        except QuartetError as error:
            raise short from error

    def watch(self, name: str, after: int = 0) -> Iterator[Any]:
        """A job's events to its end; a cut stream goes on where it was."""
        tries = 0
        while True:
            try:
                for event in self._job("Watch", name, after_sequence=after):
                    after, tries = event.sequence, 0
                    yield event
                return
            except Unavailable:
                if tries == RETRIES:
                    raise
                time.sleep(pause_s(tries + 1))
                tries += 1

    def cancel(self, name: str) -> Any:
        """Ask a job to end, by its full name; the job."""
        return self._job("Cancel", name, request_id=str(uuid.uuid4()))

    def pause(self, name: str) -> Any:
        """Ask a training job to save and stop, by its full name; the job, PAUSED once its worker is gone."""
        return self._job("Pause", name, request_id=str(uuid.uuid4()))

    def resume(self, name: str) -> Any:
        """Let a paused training job go on, by its full name; the job."""
        return self._job("Resume", name, request_id=str(uuid.uuid4()))

    def _job(self, verb: str, name: str, **fields: Any) -> Any:
        """One rpc on a job of any kind."""
        kind = next((kind for kind in JOBS if f"/{kind}/" in name), "trainingJobs")
        room, messages, resource = JOBS[kind]
        request = getattr(messages, f"{verb}{resource}Request")(name=name, **fields)
        return getattr(getattr(self, room), f"{verb}{resource}")(request)

    def model(self, name: str) -> conversion_pb2.Model:
        """A model by its full or short name."""
        request = conversion_pb2.GetModelRequest(name=self.name("models", name))
        found: conversion_pb2.Model = self.conversion.GetModel(request)
        return found

    # ------------------------------------------------------------------------------------------ endpoints

    def serve(self, model: str, adapters: Mapping[str, str] | None = None, **more: Any) -> inference_pb2.Endpoint:
        """Create an endpoint and wait until it answers; `more` are further fields of Endpoint, and endpoint_id."""
        endpoint_id = more.pop("endpoint_id", "")
        served = [
            inference_pb2.ServedAdapter(alias=alias, model=self.name("models", name))
            for alias, name in (adapters or {}).items()
        ]
        endpoint = inference_pb2.Endpoint(model=self.name("models", model), adapters=served, **more)
        request = inference_pb2.CreateEndpointRequest(
            parent=self.parent, endpoint_id=endpoint_id, endpoint=endpoint, request_id=str(uuid.uuid4())
        )
        return self.wait_ready(self.inference.CreateEndpoint(request).name)

    def wait_ready(self, name: str, timeout_s: float = 600.0) -> inference_pb2.Endpoint:
        """The endpoint once it is READY; its error if it FAILED."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            endpoint: inference_pb2.Endpoint = self.inference.GetEndpoint(inference_pb2.GetEndpointRequest(name=name))
            if endpoint.state == inference_pb2.Endpoint.READY:
                return endpoint
            if endpoint.state == inference_pb2.Endpoint.FAILED:
                raise from_status(endpoint.error)
            time.sleep(0.2)
        raise Aborted(f"{name} was not ready within {timeout_s:.0f} s", reason="ENDPOINT_NOT_READY")

    def chat(
        self,
        endpoint: str,
        messages: Sequence[tuple[str, str]],
        adapter: str = "",
        template: str = "",
        images: Sequence[bytes] = (),
        said: Sequence[Sequence[int]] = (),
        **sampling: Any,
    ) -> Iterator[inference_pb2.ChatResponse]:
        """Stream an answer to (role, text) messages; the first of the user's shows `images`, and `said` are the tokens of
        the assistant's, in their order."""
        turns = []
        shown = [inference_pb2.Part(image=inference_pb2.Image(data=data)) for data in images]
        for role, text in messages:
            kind = inference_pb2.Message.Role.Value(role.upper())
            before, shown = (shown, []) if role == "user" else ([], shown)
            ids, said = (said[:1], said[1:]) if role == "assistant" else ((), said)
            content = [*before, inference_pb2.Part(text=text)]
            turns.append(inference_pb2.Message(role=kind, content=content, token_ids=ids[0] if ids else ()))
        request = inference_pb2.ChatRequest(
            endpoint=endpoint,
            adapter=adapter,
            messages=turns,
            template=template,
            sampling=inference_pb2.Sampling(**sampling),
        )
        return iter(self.inference.Chat(request))
