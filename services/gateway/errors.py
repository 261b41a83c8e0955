"""What goes wrong, in OpenAI's form: statuses, bodies, and the field that is blamed.

Source of the shapes: OpenAI's API reference, "Error codes".
"""

from __future__ import annotations

from typing import Any

from services.common import names
from services.finetune.errors import InvalidArgument, NotFound, QuartetError, Violation

STATUS = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FAILED_PRECONDITION": 400,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""HTTP status by our code; 500 for the rest. Clients of OpenAI's API ask again after a 409, which helps where things change
meanwhile, and not where a model cannot do what is asked."""

STATUS_OF = {"BODY_TOO_LARGE": 413, "ENDPOINT_NOT_READY": 503}
"""HTTP status by our reason, where that tells more."""

CODES = {
    "ENDPOINT_NOT_FOUND": "model_not_found",
    "ADAPTER_NOT_FOUND": "model_not_found",
    "TOKEN_MISSING": "invalid_api_key",
    "TOKEN_WRONG": "invalid_api_key",
    "PROMPT_TOO_LONG": "context_length_exceeded",
}
"""OpenAI's own words, for those of our reasons that clients of its API test."""

PARAMS = {"sampling.json_schema": "response_format"}
"""OpenAI's fields, where a field of ours has another name; those below `sampling` have their own."""


def error_object(error: QuartetError) -> dict[str, Any]:
    """The body of a failed request; `code` is our reason, in lower case as OpenAI writes them."""
    status = status_of(error)
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(status)
    kind = kind or ("invalid_request_error" if status < 500 else "server_error")
    field = error.violations[0].field if error.violations else None
    param = PARAMS.get(field, field.removeprefix("sampling.")) if field else None
    message = error.message.replace(field, param) if field and param else error.message
    code = CODES.get(error.reason, error.reason.lower())
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def status_of(error: QuartetError) -> int:
    """The HTTP status of a failed request."""
    return STATUS_OF.get(error.reason) or STATUS.get(error.code, 500)


def read_model(model: Any) -> str:
    """A body's model. InvalidArgument (FIELD_INVALID); NotFound (ENDPOINT_NOT_FOUND) for what no endpoint can be called."""
    if not isinstance(model, str) or not model:
        raise bad("model", "must name an endpoint; /v1/models lists them")
    try:
        names.parse("{id}", model.partition(":")[0])
    except InvalidArgument as error:
        raise NotFound(
            f"the model {model[:100]!r} is not served; /v1/models lists what is", reason="ENDPOINT_NOT_FOUND"
        ) from error
    return model


def bad(name: str, why: str, reason: str = "FIELD_INVALID") -> InvalidArgument:
    """A field is blamed."""
    return InvalidArgument(f"{name} {why}".strip(), reason=reason, violations=[Violation(name, why, reason)])
