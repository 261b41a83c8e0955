"""What the inference room decides: which endpoints there are, and what they are wanted to serve."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.common import holding, names
from services.common.jobs import job_key
from services.common.paging import page
from services.common.records import Record, Records
from services.finetune.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Violation,
    blamed,
    from_json,
)
from services.finetune.store import Store
from services.finetune.store.artifacts import get_ref, load, read_file
from services.inference.adapters import (
    Adapter,
    changed,
    needs,
    settled,
    wanted,
    with_adapter,
    without_adapter,
)
from services.inference.keeper import KIND, STOP_GRACE_S, TICK_S
from services.inference.parity import check_parity
from services.inference.servable import ENGINES, check_hot, check_weights

ENDPOINT = "workspaces/{workspace}/endpoints/{endpoint}"
MODEL = "workspaces/{workspace}/models/{model}"
FOUR_BITS = ("nf4", "fp4", "int4", "gptq")
"""Those with 4 bits of the forms that a worker quantises to."""
CHANGE_S = 60.0
"""Seconds that a change of adapters is waited for."""


class Inference:
    """Endpoints as their callers see them; keeper.py brings the engine servers to what is decided here."""

    def __init__(self, store: Store, records: Records, engine: str = "transformers") -> None:
        self._store = store
        self._records = records
        self._engine = engine  # of endpoints that name none

    # ------------------------------------------------------------------------------------------ endpoints

    def create(
        self, parent: str, endpoint_id: str, spec: dict[str, Any], request: tuple[str, str], dry: bool
    ) -> Record:
        names.parse("workspaces/{workspace}", parent, "parent")
        made = self._records.requested(KIND, *request)
        if made is not None:
            return made
        name = f"{parent}/endpoints/{names.choose_id(endpoint_id, request[0], 'endpoint')}"
        spec = self._resolved(spec)
        body = {"spec": spec, "key": job_key(name), "attempt": 0, "handle": None, "failures": 0, "not_before": 0.0}
        record = Record(name, KIND, "STARTING", body)
        try:
            if not dry:
                with holding.taken(self._store, record, needs(record)):
                    self._still_named([("model", spec["model"], spec["digest"])], spec["adapters"])
                    made = self._records.create(record, *request)
                if made.body["key"] != record.body["key"]:
                    holding.let_go(self._store, record)
                return made
            if self._records.get(name) is None:
                return record
        except AlreadyExists:
            pass  # told in this room's words below
        raise AlreadyExists(
            f"{name} exists already; delete it, or choose another endpoint_id",
            reason="ENDPOINT_EXISTS",
            metadata={"name": name},
        )

    def get(self, name: str) -> Record:
        names.parse(ENDPOINT, name)
        record = self._records.get(name)
        if record is None or record.state == "STOPPING":
            raise NotFound(f"there is no endpoint {name}", reason="ENDPOINT_NOT_FOUND", metadata={"name": name})
        return record

    def list(self, parent: str, **paging: Any) -> tuple[Sequence[Record], str]:
        names.parse("workspaces/{workspace}", parent, "parent")

        def fields(r: Record) -> Mapping[str, Any]:
            return {**r.body["spec"], "name": r.name, "state": r.state, "create_time": r.create_time}

        return page(
            self._records.find(KIND, parent + "/", ("STARTING", "READY", "FAILED")),
            fields=fields,
            orders=["create_time"],
            default_order="create_time desc",
            **paging,
        )

    def ready(self, parent: str) -> Sequence[Record]:
        """The endpoints of a workspace that answer now, oldest first."""
        names.parse("workspaces/{workspace}", parent, "parent")
        return self._records.find(KIND, parent + "/", ("READY",))

    def delete(self, name: str, etag: str) -> None:
        """Forget an endpoint. The thread stops its engine, also after a crash; this waits for it, so that the memory
        and the name are free again."""
        while True:
            record = self.get(name)
            if etag and etag != record.etag:
                raise Aborted(f"{name} changed meanwhile; read it again", reason="ETAG_MISMATCH")
            try:
                self._records.update(replace(record, state="STOPPING"))
                break
            except Aborted:
                if etag:
                    raise
        deadline = time.monotonic() + 2 * STOP_GRACE_S
        while self._records.get(name) is not None and time.monotonic() < deadline:
            time.sleep(TICK_S / 4)

    def load_adapter(self, name: str, alias: str, model: str, etag: str) -> Record:
        """Serve an adapter under an alias; the endpoint once it does, or at once if it is not READY."""

        def adapters(record: Record) -> Sequence[Adapter]:
            spec = record.body["spec"]
            new = self._adapter("adapter", {"alias": alias, "model": model}, spec, spec["digest"])
            return with_adapter(spec["adapters"], new)

        return self._change(name, etag, adapters)

    def unload_adapter(self, name: str, alias: str, etag: str) -> Record:
        """Serve nothing under an alias any more; as load_adapter."""
        return self._change(name, etag, lambda r: without_adapter(wanted(r), alias, name))

    def _change(self, name: str, etag: str, adapters: Callable[[Record], Sequence[Adapter]]) -> Record:
        change = uuid.uuid4().hex
        while True:
            record = self.get(name)
            if record.state == "FAILED":
                raise _not_ready(record)
            if etag and etag != record.etag:
                raise Aborted(f"{name} changed meanwhile; read it again", reason="ETAG_MISMATCH")
            new = changed(record, adapters(record), change)
            holding.take(self._store, new, needs(record) | needs(new))
            self._still_named([], [a for a in wanted(new) if a not in wanted(record)])
            with contextlib.suppress(Aborted):
                record = self._records.update(new)
                break
        deadline = time.monotonic() + CHANGE_S
        while record.state == "READY" and not settled(record):
            if time.monotonic() > deadline:
                raise Aborted(f"{name} still loads; GetEndpoint and Chat will tell", reason="ADAPTER_PENDING")
            time.sleep(TICK_S / 4)
            record = self.get(name)
        refused = record.body.get("refused")
        if refused and refused["change"] == change:
            raise from_json(refused["error"])
        return record

    def address(self, name: str) -> str:
        """Where a READY endpoint's engine listens. FailedPrecondition (ENDPOINT_NOT_READY)."""
        record = self.get(name)
        if record.state != "READY":
            raise _not_ready(record)
        return str(record.body["address"])

    def _resolved(self, spec: dict[str, Any]) -> dict[str, Any]:
        """`spec` with the digests that its names stand for now, checked as far as can be without loading anything."""
        _one_of("engine", spec["engine"], ("", *ENGINES))
        spec = {**spec, "engine": spec["engine"] or self._engine}
        _one_of("dtype", spec["dtype"], ("", "bfloat16", "float16", "float32"))
        _one_of("bits", spec["bits"], (0, 4, 8))
        digest, spec["dtype"] = self._weights(spec)
        adapters = [self._adapter(f"endpoint.adapters[{n}]", a, spec, digest) for n, a in enumerate(spec["adapters"])]
        aliases = [a["alias"] for a in adapters]
        for n, alias in enumerate(aliases):
            if alias in aliases[:n]:
                raise _bad_alias(f"endpoint.adapters[{n}]", f"two adapters have the alias {alias!r}")
        check_parity(self._store, spec["model"], digest, digest)
        template = load(self._store, digest).meta["template"]
        return {**spec, "digest": digest, "adapters": adapters, "template": template}

    def _weights(self, spec: Mapping[str, Any]) -> tuple[str, str]:
        """The digest of the model that `spec` names, and the dtype to serve it in; empty for the machine's best."""
        digest, kind = self._model(spec["model"], "endpoint.model")
        if kind == "exported":
            raise FailedPrecondition(
                f"{spec['model']} is of kind EXPORTED, made for use elsewhere: serve the model that it was made from",
                reason="MODEL_NOT_SERVABLE",
                metadata={"model": spec["model"], "kind": "EXPORTED"},
            )
        if kind == "vision_tower":
            raise FailedPrecondition(
                f"{spec['model']} is of kind VISION_TOWER, which answers nothing: assemble a LLaVA model with it "
                "(CreateConversionJob with assemble)",
                reason="MODEL_NOT_SERVABLE",
                metadata={"model": spec["model"], "kind": "VISION_TOWER"},
            )
        if kind == "quantized" and spec["bits"]:
            raise FailedPrecondition(
                f"{spec['model']} is quantised already: leave bits out", reason="MODEL_NOT_SERVABLE"
            )
        if kind == "encoder" and (spec["engine"] != "transformers" or spec["bits"]):
            raise FailedPrecondition(
                f"{spec['model']} is an encoder: serve it with the engine transformers, and leave bits out",
                reason="MODEL_NOT_SERVABLE",
            )
        if kind not in ("base", "merged", "quantized", "encoder"):
            raise FailedPrecondition(
                f"{spec['model']} is of kind {kind.upper()}: serve its base model with it under adapters, or merge it "
                "into its base first (CreateConversionJob with merge)",
                reason="MODEL_NOT_SERVABLE",
                metadata={"model": spec["model"], "kind": kind.upper()},
            )
        four_bits = kind == "quantized" and load(self._store, digest).meta.get("quantization") in FOUR_BITS
        check_weights(spec["engine"], spec["dtype"], spec["bits"], four_bits)
        # The machine's best may be float32, which these lack.
        lacking = spec["engine"] == "vllm" and (four_bits or spec["bits"])
        return digest, spec["dtype"] or ("bfloat16" if lacking else "")

    def _adapter(self, where: str, adapter: Mapping[str, str], spec: Mapping[str, Any], base: str) -> dict[str, str]:
        """`adapter` with its digest, if the endpoint `spec` on the artifact `base` can serve it."""
        try:
            names.parse("{id}", adapter["alias"])
        except InvalidArgument as error:
            why = f"the alias {adapter['alias'][:100]!r} must be a letter, then letters, digits and '-', lower case"
            raise _bad_alias(where, why) from error
        digest, kind = self._model(adapter["model"], f"{where}.model")
        if kind != "adapter":
            raise FailedPrecondition(
                f"{adapter['model']} is of kind {kind.upper()}, not an adapter: serve it as a model of its own",
                reason="MODEL_NOT_SERVABLE",
                metadata={"model": adapter["model"], "kind": kind.upper()},
            )
        manifest, model = load(self._store, digest), spec["model"]
        own = next((p for p in manifest.parents if p.role == "base"), None)
        if own is None or own.digest != base:
            trained_on = (own.name or own.digest) if own else "an unknown base"
            raise FailedPrecondition(
                f"{adapter['model']} was trained on {trained_on}, and not on {model}: serve it on its own base",
                reason="BASE_MISMATCH",
                metadata={"adapter": adapter["model"], "base": own.digest if own else "", "model": base},
            )
        config = json.loads(read_file(self._store, manifest, "adapter_config.json"))
        check_hot(config, spec["engine"], adapter["model"], manifest.meta.get("parts", ()))
        check_parity(self._store, adapter["model"], digest, base)
        return {"alias": adapter["alias"], "name": adapter["model"], "digest": digest}

    def _still_named(self, models: Sequence[tuple[str, str, str]], adapters: Sequence[Adapter]) -> None:
        """What is held by now may have been deleted before it was. NotFound (MODEL_NOT_FOUND), Aborted (MODEL_CHANGED)."""
        for field, name, digest in [*models, *(("adapter", a["name"], a["digest"]) for a in adapters)]:
            if self._model(name, field)[0] != digest:
                raise Aborted(f"{name} changed meanwhile; ask again", reason="MODEL_CHANGED", metadata={"name": name})

    def _model(self, name: str, field: str) -> tuple[str, str]:
        """(digest, kind) that a model's name stands for."""
        names.parse(MODEL, name, field)
        ref = get_ref(self._store, name)
        if ref is None:
            raise NotFound(f"there is no model {name}", reason="MODEL_NOT_FOUND", metadata={"name": name})
        return ref.body["digest"], ref.body["kind"]


def _one_of(field: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        listed = ", ".join(str(k) for k in known if k != "")
        reason = f"{field.upper()}_UNKNOWN"
        raise InvalidArgument(
            f"endpoint.{field}: {value!r} is not offered; choose one of {listed}",
            reason=reason,
            violations=[Violation(f"endpoint.{field}", f"must be one of {listed}", reason)],
        )


def _not_ready(record: Record) -> FailedPrecondition:
    error = (record.body.get("error") or {}).get("message", "")
    return FailedPrecondition(
        f"{record.name} is {record.state}{': ' + error if error else '; ask again soon'}",
        reason="ENDPOINT_NOT_READY",
        metadata={"state": record.state},
    )


def _bad_alias(where: str, why: str) -> InvalidArgument:
    return blamed(f"{where}.alias", why, "ALIAS_MALFORMED")
