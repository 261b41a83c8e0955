"""Errors to wire codes and back: the only place where both vocabularies meet."""

from __future__ import annotations

from typing import Any, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[attr-defined]  # the wheel ships no types
from grpc_status import rpc_status

from services.finetune.errors import BY_CODE, DOMAIN, Internal, QuartetError, Unavailable, Violation

STATUS_BYTES_KEY = "quartet-status-bytes"
"""Metadata of a call: the largest status that the caller's channel takes, if it is more than gRPC's default."""
DEFAULT_STATUS_BYTES = 5_000
"""gRPC refuses trailers from 8 KiB on at random and from 16 KiB on always; base64 adds a third, the text stands twice."""
MAX_STATUS_BYTES = 1 << 20

CHANNEL_OPTIONS = (
    ("grpc.max_metadata_size", 2 * MAX_STATUS_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * MAX_STATUS_BYTES),
    ("grpc.max_receive_message_length", 4 << 20),
)
"""A channel with these may send STATUS_METADATA."""
STATUS_METADATA = ((STATUS_BYTES_KEY, str(MAX_STATUS_BYTES)),)


def fitted(error: QuartetError, limit: int) -> Any:
    """`to_status` in at most `limit` bytes: the last violations are left out, and counted in the metadata."""
    status = to_status(error)
    kept = len(error.violations)
    while status.ByteSize() > limit and kept:
        kept = min(kept - 1, kept * limit // status.ByteSize())
        left_out = {"violations_left_out": str(len(error.violations) - kept)}
        status = to_status(
            type(error)(
                error.message,
                reason=error.reason,
                metadata={**error.metadata, **left_out},
                violations=error.violations[:kept],
            )
        )
    if status.ByteSize() > limit:
        status.message = status.message[: limit // 4]
    return status


def to_status(error: QuartetError) -> Any:
    """google.rpc.Status with ErrorInfo, BadRequest when fields are blamed, RetryInfo when it is known how long to wait."""
    status = status_pb2.Status(code=code_pb2.Code.Value(error.code), message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    details: list[Any] = [info]
    if error.violations:
        blamed = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.message, reason=v.reason)
            for v in error.violations
        ]
        details.append(error_details_pb2.BadRequest(field_violations=blamed))
    if "retry_after_s" in error.metadata:
        wait = duration_pb2.Duration(seconds=int(error.metadata["retry_after_s"]))
        details.append(error_details_pb2.RetryInfo(retry_delay=wait))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def from_status(status: Any) -> QuartetError:
    """The error that `to_status` drew; unknown details are ignored."""
    info, blamed = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        for known in (info, blamed):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    code = code_pb2.Code.Name(status.code)
    return BY_CODE.get(code, Internal)(
        status.message,
        reason=info.reason or code,
        metadata=dict(info.metadata),
        violations=[Violation(v.field, v.description, v.reason) for v in blamed.field_violations],
    )


def from_rpc_error(error: grpc.RpcError) -> QuartetError:
    """What a failed call means: our own details if it has them, else what gRPC itself says."""
    call = cast(grpc.Call, error)
    status = rpc_status.from_call(call)
    if status is not None:
        return from_status(status)
    code = call.code().name
    cls = BY_CODE.get(code, Internal)
    return cls(call.details() or code, reason="UNREACHABLE" if cls is Unavailable else code)
