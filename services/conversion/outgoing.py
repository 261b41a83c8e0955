"""Tasks that make other forms of a model, and where the settings let exports go."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_type_hints
from urllib.parse import SplitResult, urlsplit

from services.finetune.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from services.finetune.orders import (
    ArtifactRef,
    ExportTask,
    GgufType,
    MergeReport,
    MergeTask,
    QuantizeTask,
    ReshardTask,
)
from services.finetune.store.artifacts import Manifest

Arguments = Mapping[str, Any]
BASE_DTYPES = ("", "nf4", "nf4-single")
WHOLE = ("base", "merged")
_FORMS = get_args(get_type_hints(ExportTask)["form"])
_METHODS = get_args(get_type_hints(QuantizeTask)["method"])
_SHAPES = {
    "hf": re.compile(r"hf://[\w.-]+/[\w.-]+(@[\w./-]+)?"),
    "s3": re.compile(r"s3://[\w.-]+(/[\w.=+-]+)+"),
    "oci": re.compile(r"oci://[\w.-]+(:\d+)?(/[a-z0-9]+([._-]+[a-z0-9]+)*)+(:[\w][\w.-]{0,127})?"),
}


def merge(arguments: Arguments, adapter: ArtifactRef, base: ArtifactRef, limit: int) -> MergeTask:
    """InvalidArgument (DTYPE_UNKNOWN, TASK_INVALID)."""
    _one_of("base_dtype", arguments["base_dtype"], BASE_DTYPES, "DTYPE_UNKNOWN")
    _one_of("report", arguments["report"], get_args(MergeReport), "TASK_INVALID")
    more = {name: arguments[name] for name in ("dtype", "base_dtype", "report")}
    return MergeTask(adapter=adapter, base=base, max_shard_size_bytes=limit, **more)


def reshard(arguments: Arguments, model: ArtifactRef, limit: int) -> ReshardTask:
    return ReshardTask(model=model, dtype=arguments["dtype"], max_shard_size_bytes=limit)


def export(arguments: Arguments, model: ArtifactRef, kind: str, allowed: Sequence[str]) -> ExportTask:
    """InvalidArgument (FORM_UNKNOWN, TASK_INVALID, DESTINATION_MALFORMED), FailedPrecondition (MODEL_NOT_WHOLE,
    MODEL_NOT_ADAPTER), PermissionDenied (DESTINATION_FORBIDDEN)."""
    form: Any = arguments["form"] or "hf"
    gguf_type = arguments["gguf_type"].lower()
    _one_of("form", form, _FORMS, "FORM_UNKNOWN")
    _one_of("gguf_type", gguf_type, get_args(GgufType), "FORM_UNKNOWN")
    if gguf_type and form != "gguf":
        raise InvalidArgument(f"gguf_type goes with the form gguf, not {form}", reason="TASK_INVALID")
    if form == "xtuner" and kind != "adapter":
        raise FailedPrecondition(
            f"{model.name} is of kind {kind.upper()}; XTuner's folders are made of adapters of LLaVA models",
            reason="MODEL_NOT_ADAPTER",
        )
    if form not in ("hf", "xtuner") and kind not in WHOLE:
        raise FailedPrecondition(
            f"{model.name} is of kind {kind.upper()}; only BASE and MERGED models become {form}: merge an adapter "
            "first, and of a quantised model export what it was made from",
            reason="MODEL_NOT_WHOLE",
        )
    if arguments["public"] and not arguments["destination"].startswith("hf://"):
        raise InvalidArgument("public speaks of a hub's repository; give an hf:// destination", reason="TASK_INVALID")
    destination = arguments["destination"] and allowed_place(arguments["destination"], allowed)
    return ExportTask(model=model, form=form, gguf_type=gguf_type, destination=destination, public=arguments["public"])


def quantize(
    arguments: Arguments, model: ArtifactRef, revision: Callable[[str], tuple[ArtifactRef, Manifest]]
) -> QuantizeTask:
    """InvalidArgument (METHOD_UNKNOWN, TASK_INVALID), and what `revision` raises."""
    method, wanted = arguments["method"], arguments["calibration"]
    _one_of("method", method, _METHODS, "METHOD_UNKNOWN")
    rows, length = arguments["calibration_rows"], arguments["max_length"]
    if (method == "gptq") != bool(wanted):
        why = (
            "gptq needs a calibration revision" if method == "gptq" else f"{method} needs no calibration: leave it out"
        )
        raise InvalidArgument(why, reason="TASK_INVALID")
    if rows < 0 or length < 0 or (method != "gptq" and (rows or length)):
        raise InvalidArgument(
            "calibration_rows and max_length are not negative, and go with gptq", reason="TASK_INVALID"
        )
    if not wanted:
        return QuantizeTask(model=model, method=method)
    calibration, manifest = revision(wanted)
    if manifest.meta.get("format") == "files":
        raise InvalidArgument(f"{wanted} holds files, not rows", reason="TASK_INVALID")
    return QuantizeTask(
        model=model, method=method, calibration=calibration, calibration_rows=rows or 256, max_length=length or 2048
    )


def allowed_place(destination: str, allowed: Sequence[str]) -> str:
    """`destination`, completed by the first of `allowed` that it lies below: those say how an S3 server is reached.

    InvalidArgument (DESTINATION_MALFORMED), PermissionDenied (DESTINATION_FORBIDDEN).
    """
    parts = urlsplit(destination)
    shape = _SHAPES.get(parts.scheme)
    if shape is None or not shape.fullmatch(destination) or {".", ".."} & set(parts.path.split("/")):
        raise InvalidArgument(
            f"not a destination: {destination[:200]!r}; write hf://owner/name, s3://bucket/prefix or "
            "oci://registry/repository:tag",
            reason="DESTINATION_MALFORMED",
        )
    for prefix in map(urlsplit, allowed):
        if (prefix.scheme, prefix.netloc) == (parts.scheme, parts.netloc) and _below(parts, prefix):
            return parts._replace(query=prefix.query).geturl()
    raise PermissionDenied(
        f"this service does not export to {destination}; let its --export-prefixes name the place",
        reason="DESTINATION_FORBIDDEN",
        metadata={"destination": destination[:200]},
    )


def _below(parts: SplitResult, prefix: SplitResult) -> bool:
    root, path = prefix.path.strip("/"), parts.path.strip("/")
    # A tag or a branch belongs to the repository before it.
    return not root or path == root or path.startswith((root + "/", root + ":", root + "@"))


def _one_of(field: str, value: str, known: Sequence[str], reason: str) -> None:
    if value not in known:
        words = ", ".join(k for k in known if k)
        raise InvalidArgument(f"unknown {field} {value[:100]!r}; use {words}", reason=reason)
