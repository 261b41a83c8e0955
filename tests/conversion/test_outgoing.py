"""Reshard, export and quantize as the service takes them: what is refused before any worker starts."""

from __future__ import annotations

from typing import Any

import pytest
from quartet.conversion.v1 import conversion_pb2 as pb
from quartet.conversion.v1.conversion_pb2_grpc import ConversionStub

from services.conversion.outgoing import allowed_place
from services.finetune.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, QuartetError
from tests.common.serving import W, refused
from tests.conversion.test_conversion import BASE, REV, home, request, room, roots, store, watch

__all__ = ["home", "room", "roots", "store"]

ALLOWED = ("hf://me", "s3://bucket/out?endpoint=http://store:8333", "oci://registry:5000/team", "oci://other/one/repo")


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        (pb.Model.BASE, {"reshard": pb.ReshardTask(model=BASE, dtype="bfloat16", max_shard_size_bytes=1000)}),
        (pb.Model.EXPORTED, {"export": pb.ExportTask(model=BASE, form="gguf", gguf_type="q4_k_m")}),
        (pb.Model.EXPORTED, {"export": pb.ExportTask(model=f"{W}/models/adapter", form="hf")}),
        (pb.Model.QUANTIZED, {"quantize": pb.QuantizeTask(model=BASE, method="fp8")}),
    ],
)
def test_whole_job(room: ConversionStub, kind: Any, task: dict[str, Any]) -> None:
    made = room.CreateConversionJob(request(**task))
    (name,) = task
    assert made.WhichOneof("task") == name and getattr(made, name) == task[name]
    watch(room, made.name)
    assert room.GetModel(pb.GetModelRequest(name=made.target_model)).kind == kind


@pytest.mark.parametrize(
    ("error", "reason", "task"),
    [
        (NotFound, "MODEL_NOT_FOUND", {"reshard": pb.ReshardTask(model=f"{W}/models/none")}),
        (InvalidArgument, "DTYPE_UNKNOWN", {"reshard": pb.ReshardTask(model=BASE, dtype="int4")}),
        (InvalidArgument, "SHARD_SIZE_INVALID", {"reshard": pb.ReshardTask(model=BASE, max_shard_size_bytes=-1)}),
        (FailedPrecondition, "MODEL_NOT_WHOLE", {"reshard": pb.ReshardTask(model=f"{W}/models/adapter")}),
        (InvalidArgument, "FORM_UNKNOWN", {"export": pb.ExportTask(model=BASE, form="onnx")}),
        (InvalidArgument, "FORM_UNKNOWN", {"export": pb.ExportTask(model=BASE, form="gguf", gguf_type="q3")}),
        (InvalidArgument, "TASK_INVALID", {"export": pb.ExportTask(model=BASE, form="hf", gguf_type="f16")}),
        (InvalidArgument, "TASK_INVALID", {"export": pb.ExportTask(model=BASE, public=True)}),
        (FailedPrecondition, "MODEL_NOT_WHOLE", {"export": pb.ExportTask(model=f"{W}/models/adapter", form="gguf")}),
        (PermissionDenied, "DESTINATION_FORBIDDEN", {"export": pb.ExportTask(model=BASE, destination="hf://me/m")}),
        (InvalidArgument, "DESTINATION_MALFORMED", {"export": pb.ExportTask(model=BASE, destination="/tmp/x")}),
        (InvalidArgument, "METHOD_UNKNOWN", {"quantize": pb.QuantizeTask(model=BASE, method="awq")}),
        (InvalidArgument, "TASK_INVALID", {"quantize": pb.QuantizeTask(model=BASE, method="gptq")}),
        (InvalidArgument, "TASK_INVALID", {"quantize": pb.QuantizeTask(model=BASE, method="nf4", calibration=REV)}),
        (InvalidArgument, "TASK_INVALID", {"quantize": pb.QuantizeTask(model=BASE, method="nf4", max_length=5)}),
        (
            FailedPrecondition,
            "MODEL_NOT_WHOLE",
            {"quantize": pb.QuantizeTask(model=f"{W}/models/adapter", method="nf4")},
        ),
    ],
)
def test_refused(room: ConversionStub, error: type[QuartetError], reason: str, task: dict[str, Any]) -> None:
    with refused(error, reason):
        room.CreateConversionJob(request(**task))


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        ("hf://me/model@v1", "hf://me/model@v1"),
        ("s3://bucket/out/a/b", "s3://bucket/out/a/b?endpoint=http://store:8333"),
        ("oci://registry:5000/team/model:v1", "oci://registry:5000/team/model:v1"),
        ("oci://other/one/repo:v2", "oci://other/one/repo:v2"),
    ],
)
def test_places_below_what_is_allowed(given: str, completed: str) -> None:
    assert allowed_place(given, ALLOWED) == completed


@pytest.mark.parametrize(
    "given",
    [
        "hf://you/model", "hf://me2/model", "s3://bucket/other", "s3://bucket/outer", "s3://bucket2/out/a",
        "oci://registry/team/model", "oci://other/one/repository", "oci://evil@registry:5000/team/model",
        "s3://bucket/out/../other", "s3://bucket/out/a?endpoint=http://evil", "hf://me/../you", "http://me/model", "",
    ],
)  # fmt: skip
def test_places_that_are_not_allowed(given: str) -> None:
    with pytest.raises((PermissionDenied, InvalidArgument)):
        allowed_place(given, ALLOWED)
