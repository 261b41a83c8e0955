"""What the datasets room decides about validations: a job that looks at every row of a revision."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from services.common import names
from services.common.jobs import Jobs
from services.common.records import Record
from services.common.supervisor import Work
from services.datasets.usecases import Datasets
from services.finetune.config import to_json
from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.orders import ArtifactRef, ValidateRun
from services.finetune.prepare import holds_rows
from services.finetune.store import Store
from services.finetune.templates import check_name

VALIDATION = "workspaces/{workspace}/validations/{validation}"


class Validating:
    """Validations. `jobs` is set by the wiring, which needs `work` first."""

    jobs: Jobs

    def __init__(self, store: Store, datasets: Datasets) -> None:
        self._datasets = datasets
        self.work = Work(
            "validation", "validate", lambda job: dict(job.body["spec"]["run"]), self._succeed, keeps=_report
        )
        # A digest names one report for ever, so it may be kept.
        self._read = lru_cache(maxsize=64)(lambda digest: json.loads(b"".join(store.read_blob(digest))))

    def create(self, revision: str, validation_id: str, spec: dict[str, Any], request: tuple[str, str]) -> Record:
        """ValidateRevision. `request` is (request_id, fingerprint)."""
        made = self.jobs.records.requested(self.work.kind, *request)
        if made is not None:
            return made
        found = self._datasets.revision(revision)
        if not holds_rows(found.manifest):
            raise InvalidArgument(f"{found.name} holds no rows to look at", reason="DATASET_EMPTY")
        check_length(spec["max_length"], least=0)
        workspace = found.name.partition("/datasets/")[0]
        name = f"{workspace}/validations/{names.choose_id(validation_id, request[0], 'validation')}"

        def order() -> Any:
            there = self._datasets.revision(found.name)
            run = ValidateRun(
                job=name,
                dataset=ArtifactRef(name=there.name, digest=there.digest),
                model=self._model(spec["model"], spec["template"]) if spec["model"] else None,
                **{k: spec[k] for k in ("template", "system", "max_length")},
            )
            return to_json(run)

        return self.jobs.create(name, {**spec, "revision": found.name, "run": order()}, *request, again=order)

    def get(self, name: str) -> Record:
        names.parse(VALIDATION, name)
        return self.jobs.get(name)

    def cancel(self, name: str) -> Record:
        names.parse(VALIDATION, name)
        return self.jobs.cancel(name)

    def delete(self, name: str, etag: str) -> None:
        names.parse(VALIDATION, name)
        self.jobs.delete(name, etag)

    def watch(self, name: str, after: int) -> Iterator[Any]:
        names.parse(VALIDATION, name)
        return self.jobs.watch(name, after)

    def report(self, record: Record) -> Mapping[str, Any] | None:
        """What was found, as the message ValidationReport; None before the end."""
        found: Mapping[str, Any] | None = self._read(record.body["report"]) if "report" in record.body else None
        return found

    def _model(self, name: str, template: str) -> ArtifactRef:
        digest, manifest = self._datasets.model(name)
        if template:
            check_name(template)
        elif not manifest.meta.get("template"):
            raise FailedPrecondition(
                f"{name} has no chat template of its own; name a template", reason="TEMPLATE_MISSING"
            )
        return ArtifactRef(name=name, digest=digest)

    def _succeed(self, job: Record, result: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"report": result["report"]}


def _report(job: Record) -> set[str]:
    return {job.body["report"]} if "report" in job.body else set()


def check_length(max_length: int, least: int) -> None:
    """InvalidArgument (MAX_LENGTH_INVALID)."""
    if max_length < least:
        raise InvalidArgument(f"max_length must be at least {least}, not {max_length}", reason="MAX_LENGTH_INVALID")
