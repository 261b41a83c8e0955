"""The one vocabulary of errors, from the store to the command line.

    QuartetError
    |-- InvalidArgument      65   the request or its data is wrong, whatever the state of the system
    |-- OutOfRange           65   an offset, page or row that is not there
    |-- NotFound             66
    |-- AlreadyExists        73
    |-- FailedPrecondition   78   right request, wrong state: something must be done first
    |-- PermissionDenied     77
    |-- Unauthenticated      77
    |-- Unimplemented        64
    |-- ResourceExhausted    73*  disk or memory full
    |-- Aborted              75*  lost a race: read again, try again
    |-- Unavailable          69*  try again later
    |-- DeadlineExceeded     75*
    |-- DataLoss             74*  stored bytes are not what they were
    |-- Cancelled           130
    `-- Internal             70*  a defect of ours

The number is the exit status of the command line. Classes marked * are faults of the machinery: a worker that meets one
exits with 1 and its job may be tried again; on the others it exits with the number, and the job fails at once.

This module imports nothing of gRPC: services.common.status maps these classes to wire codes and back.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

DOMAIN = "quartet"


@dataclass(frozen=True, slots=True)
class Violation:
    """One wrong field. `field` is a path such as ``files[a.jsonl].rows[3].output``; `reason` is UPPER_SNAKE."""

    field: str
    message: str
    reason: str = ""


class QuartetError(Exception):
    """Base of all errors that users meet.

    `reason` is an UPPER_SNAKE word that programs may test; `metadata` holds the values named in the message;
    `violations` blames single fields.
    """

    code: ClassVar[str] = "UNKNOWN"
    exit_status: ClassVar[int] = 70
    retryable: ClassVar[bool] = True

    def __init__(
        self,
        message: str,
        *,
        reason: str,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[Violation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)

    def to_json(self) -> dict[str, Any]:
        """The error as plain data, for a job's outcome."""
        return {
            "code": self.code,
            "reason": self.reason,
            "message": self.message,
            "metadata": self.metadata,
            "violations": [{"field": v.field, "message": v.message, "reason": v.reason} for v in self.violations],
        }


class InvalidArgument(QuartetError, ValueError):
    code, exit_status, retryable = "INVALID_ARGUMENT", 65, False


class OutOfRange(QuartetError, ValueError):
    code, exit_status, retryable = "OUT_OF_RANGE", 65, False


class NotFound(QuartetError, LookupError):
    code, exit_status, retryable = "NOT_FOUND", 66, False


class AlreadyExists(QuartetError):
    code, exit_status, retryable = "ALREADY_EXISTS", 73, False


class FailedPrecondition(QuartetError):
    code, exit_status, retryable = "FAILED_PRECONDITION", 78, False


class PermissionDenied(QuartetError):
    code, exit_status, retryable = "PERMISSION_DENIED", 77, False


class Unauthenticated(QuartetError):
    code, exit_status, retryable = "UNAUTHENTICATED", 77, False


class Unimplemented(QuartetError):
    code, exit_status, retryable = "UNIMPLEMENTED", 64, False


class ResourceExhausted(QuartetError):
    code, exit_status = "RESOURCE_EXHAUSTED", 73


class Aborted(QuartetError):
    code, exit_status = "ABORTED", 75


class Unavailable(QuartetError, ConnectionError):
    code, exit_status = "UNAVAILABLE", 69


class DeadlineExceeded(QuartetError, TimeoutError):
    code, exit_status = "DEADLINE_EXCEEDED", 75


class DataLoss(QuartetError):
    code, exit_status = "DATA_LOSS", 74


class Cancelled(QuartetError):
    code, exit_status, retryable = "CANCELLED", 130, False


class Internal(QuartetError):
    code, exit_status = "INTERNAL", 70


BY_CODE: Mapping[str, type[QuartetError]] = {
    cls.code: cls
    for cls in (
        InvalidArgument,
        OutOfRange,
        NotFound,
        AlreadyExists,
        FailedPrecondition,
        PermissionDenied,
        Unauthenticated,
        Unimplemented,
        ResourceExhausted,
        Aborted,
        Unavailable,
        DeadlineExceeded,
        DataLoss,
        Cancelled,
        Internal,
    )
}


def from_json(data: Mapping[str, Any]) -> QuartetError:
    """The error that `QuartetError.to_json` wrote; an unknown code becomes Internal."""
    return BY_CODE.get(data.get("code", ""), Internal)(
        data.get("message", ""),
        reason=data.get("reason", "UNKNOWN"),
        metadata=data.get("metadata"),
        violations=[Violation(**v) for v in data.get("violations", ())],
    )


def blamed(field: str, why: str, reason: str) -> InvalidArgument:
    """One field is wrong; the message is ``field: why``."""
    return InvalidArgument(f"{field}: {why}", reason=reason, violations=[Violation(field, why, reason)])


def out_of_memory(error: BaseException) -> bool:
    """Whether this is what Python, a GPU, or torch's allocator on the CPU raises when memory runs out."""
    # A worker that never needed torch must not load it for this.
    torch = sys.modules.get("torch")
    of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # The CPU's allocator has no class of its own for it.
    return of_gpu or isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def nearest(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or a short list of what is known."""
    close = get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    listed = ", ".join(sorted(known)[:12])
    return f"; known: {listed}{', …' if len(known) > 12 else ''}"
