"""What the datasets room decides about prepared data: equal requests have one name, and are computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from services.common import names
from services.common.jobs import Jobs
from services.common.records import Record
from services.common.supervisor import Work
from services.datasets.usecases import Datasets
from services.datasets.validating import check_length
from services.finetune.config import DataConfig, to_json
from services.finetune.errors import Aborted, AlreadyExists, InvalidArgument, Violation
from services.finetune.orders import ArtifactRef, PrepareRun
from services.finetune.prepare import check_weights, holds_rows
from services.finetune.prepare.certificate import Certificate, certify
from services.finetune.prepare.shelf import find, shelf_key
from services.finetune.store import Store
from services.finetune.store.artifacts import load
from services.finetune.templates import load_template
from services.finetune.tokenizer import Tokenizer
from services.finetune.vision import form_of

PREPARED = "workspaces/{workspace}/preparedDatasets/{prepared_dataset}"
LEAST_LENGTH = 8


class Preparing:
    """Prepared data. `jobs` is set by the wiring, which needs `work` first."""

    jobs: Jobs

    def __init__(self, store: Store, datasets: Datasets) -> None:
        self._store = store
        self._datasets = datasets
        self.work = Work("preparedDataset", "prepare", lambda job: dict(job.body["spec"]["run"]), self._succeed)
        # Reading a large tokenizer takes a second; digests name the same one for ever.
        self._certificate = lru_cache(maxsize=64)(self._certify)
        self._form = lru_cache(maxsize=64)(lambda model: form_of(store, load(store, model)))

    def prepare(self, parent: str, spec: dict[str, Any], request: tuple[str, str], dry: bool) -> Record:
        """PrepareDataset. `request` is (request_id, fingerprint)."""
        names.parse("workspaces/{workspace}", parent, "parent")
        made = self.jobs.records.requested(self.work.kind, *request)
        if made is not None:
            return made
        run, certificate = self._order(spec)
        key = shelf_key(run, certificate, self._form(run.model.digest))
        name = f"{parent}/preparedDatasets/p{key[:20]}"
        sources = zip(run.datasets, run.data.weights, strict=True)
        spec |= {
            "sources": [{"revision": d.name, "weight": w} for d, w in sources],
            "template": run.data.template,
            "max_length": run.data.max_length,
            "run": to_json(run) | {"job": name},
        }
        return self._first(name, key, spec, request, dry)

    def get(self, name: str) -> Record:
        names.parse(PREPARED, name)
        return self.jobs.get(name)

    def cancel(self, name: str) -> Record:
        names.parse(PREPARED, name)
        return self.jobs.cancel(name)

    def delete(self, name: str, etag: str) -> None:
        names.parse(PREPARED, name)
        self.jobs.delete(name, etag)

    def watch(self, name: str, after: int) -> Iterator[Any]:
        names.parse(PREPARED, name)
        return self.jobs.watch(name, after)

    def _first(self, name: str, key: str, spec: dict[str, Any], request: tuple[str, str], dry: bool) -> Record:
        """The record of equal requests: the one there is, unless it ended without a result, else a new one."""
        found = self.jobs.records.get(name)
        if found is not None and found.state not in ("FAILED", "CANCELLED"):
            return found
        if dry:
            return Record(name, self.work.kind, "QUEUED", {"spec": spec, "attempt": 0})
        if found is not None:
            with contextlib.suppress(Aborted):  # somebody else tries again as well
                self.jobs.records.delete(name, found.etag)
        digest = find(self._store, key)

        def order() -> Any:
            return to_json(self._order(spec)[0]) | {"job": name}

        try:
            result = self._result(digest) if digest else None
            return self.jobs.create(name, spec, *request, result=result, again=order)
        except AlreadyExists:
            return self.jobs.get(name)

    def _order(self, spec: Mapping[str, Any]) -> tuple[PrepareRun, Certificate]:
        """What a request asks for, by digests."""
        datasets = tuple(self._dataset(n, s["revision"]) for n, s in enumerate(spec["sources"]))
        if not datasets:
            blamed = [Violation("sources", "is empty", "DATASET_MISSING")]
            raise InvalidArgument("name a revision to prepare", reason="DATASET_MISSING", violations=blamed)
        weights = tuple(s["weight"] or 1.0 for s in spec["sources"])
        check_weights(weights, len(datasets))
        max_length = spec["max_length"] or DataConfig().max_length
        check_length(max_length, LEAST_LENGTH)
        held_out = _held_out(spec.get("held_out", 0.0))  # older records have none
        digest, manifest = self._datasets.model(spec["model"])
        certificate = self._certificate(digest, spec["template"] or manifest.meta.get("template", ""))
        data = DataConfig(
            template=certificate["template"]["name"],
            system=spec["system"],
            max_length=max_length,
            pack=not spec["separate_rows"],
            weights=weights,
        )
        model = ArtifactRef(name=spec["model"], digest=digest)
        seed = spec["seed"]
        run = PrepareRun(job="", model=model, datasets=datasets, data=data, seed=seed, held_out=held_out)
        return run, certificate

    def _dataset(self, n: int, revision: str) -> ArtifactRef:
        found = self._datasets.revision(revision)
        if not holds_rows(found.manifest):
            why = f"{found.name} holds no rows"
            blamed = [Violation(f"sources[{n}].revision", why, "DATASET_EMPTY")]
            raise InvalidArgument(why, reason="DATASET_EMPTY", violations=blamed)
        return ArtifactRef(name=found.name, digest=found.digest)

    def _certify(self, model: str, template: str) -> Certificate:
        tokenizer = Tokenizer.from_artifact(self._store, load(self._store, model))
        return certify(tokenizer, load_template(template, tokenizer))

    def _succeed(self, job: Record, result: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._result(result["prepared"])

    def _result(self, digest: str) -> dict[str, Any]:
        return {"digest": digest, "meta": dict(load(self._store, digest).meta)}


def _held_out(part: float) -> float:
    """InvalidArgument (CONFIG_VALUE_INVALID) unless it is from 0 to below 1."""
    if not 0 <= part < 1:
        why = f"{part:g} is not from 0 to below 1; rows must be left to learn from"
        blamed = [Violation("held_out", why, "CONFIG_VALUE_INVALID")]
        raise InvalidArgument(f"held_out: {why}", reason="CONFIG_VALUE_INVALID", violations=blamed)
    return part
