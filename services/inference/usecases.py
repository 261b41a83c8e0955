"""What the inference room decides: which endpoints there are, and that each has a living engine server.

    STARTING <-> READY          an engine that dies is started again, after growing pauses
        |------> FAILED         it says why it cannot serve, or keeps dying young
    any of them -> STOPPING     DeleteEndpoint; nobody sees it any more, and it is forgotten once its engine is gone

A thread moves endpoints along. Every step can be cut by kill -9 and is done again by the next service: attempts are
fenced (services.finetune.progress), and an engine that finds itself fenced ends by itself, so none is ever left over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.common import names
from services.common.jobs import job_key
from services.common.launchers import Launcher
from services.common.paging import page
from services.common.records import Record, Records
from services.finetune import progress
from services.finetune.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    QuartetError,
    Violation,
    from_json,
)
from services.finetune.store import Store
from services.finetune.store.artifacts import get_ref, load
from services.inference.adapters import (
    Adapter,
    Engines,
    changed,
    settle_one,
    settled,
    wanted,
    with_adapter,
    without_adapter,
)
from services.inference.parity import check_parity

log = logging.getLogger("quartet.inference")

ENDPOINT = "workspaces/{workspace}/endpoints/{endpoint}"
MODEL = "workspaces/{workspace}/models/{model}"
KIND = "endpoint"
TICK_S = 0.2
QUICK_FAILURES = 5
YOUNG_S = 60.0
CHANGE_S = 60.0
STOP_GRACE_S = 5.0


class Inference:
    """Endpoints and their engine servers. `start` and `stop` the thread that looks after them.

    An orderly end stops the engines unless `keep_engines`.
    """

    def __init__(
        self,
        store: Store,
        records: Records,
        launcher: Launcher,
        token_file: str,
        engines: Engines,
        keep_engines: bool = False,
    ) -> None:
        self._store = store
        self._records = records
        self._launcher = launcher
        self._token_file = token_file
        self._engines = engines
        self._keep_engines = keep_engines
        self._settling: set[str] = set()  # endpoints whose engine is just told of an adapter
        self._asked: set[str] = set()  # attempts that this process has asked to end
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="endpoints", daemon=True)

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
                return self._records.create(record, *request)
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
        while self._records.get(name) is not None and time.monotonic() < deadline and not self._stopping.is_set():
            time.sleep(TICK_S / 4)

    def load_adapter(self, name: str, alias: str, model: str, etag: str) -> Record:
        """Serve an adapter under an alias; the endpoint once it does, or at once if it is not READY."""

        def adapters(record: Record) -> Sequence[Adapter]:
            spec = record.body["spec"]
            new = self._adapter("adapter", {"alias": alias, "model": model}, spec["model"], spec["digest"])
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
            with contextlib.suppress(Aborted):
                record = self._records.update(changed(record, adapters(record), change))
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
        _one_of("engine", spec["engine"], ("", "transformers"))
        _one_of("dtype", spec["dtype"], ("", "bfloat16", "float16", "float32"))
        _one_of("bits", spec["bits"], (0, 4, 8))
        digest, kind = self._model(spec["model"], "endpoint.model")
        if kind not in ("base", "merged"):
            raise FailedPrecondition(
                f"{spec['model']} is of kind {kind.upper()}: serve its base model with it under adapters, or merge it "
                "into its base first (CreateConversionJob with merge)",
                reason="MODEL_NOT_SERVABLE",
                metadata={"model": spec["model"], "kind": kind.upper()},
            )
        adapters = [
            self._adapter(f"endpoint.adapters[{n}]", a, spec["model"], digest) for n, a in enumerate(spec["adapters"])
        ]
        aliases = [a["alias"] for a in adapters]
        for n, alias in enumerate(aliases):
            if alias in aliases[:n]:
                raise _bad_alias(f"endpoint.adapters[{n}]", f"two adapters have the alias {alias!r}")
        check_parity(self._store, spec["model"], digest, digest)
        template = load(self._store, digest).meta["template"]
        return {**spec, "digest": digest, "adapters": adapters, "template": template}

    def _adapter(self, where: str, adapter: Mapping[str, str], model: str, base: str) -> dict[str, str]:
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
        own = next((p for p in load(self._store, digest).parents if p.role == "base"), None)
        if own is None or own.digest != base:
            trained_on = (own.name or own.digest) if own else "an unknown base"
            raise FailedPrecondition(
                f"{adapter['model']} was trained on {trained_on}, and not on {model}: serve it on its own base",
                reason="BASE_MISMATCH",
                metadata={"adapter": adapter["model"], "base": own.digest if own else "", "model": base},
            )
        check_parity(self._store, adapter["model"], digest, base)
        return {"alias": adapter["alias"], "name": adapter["model"], "digest": digest}

    def _model(self, name: str, field: str) -> tuple[str, str]:
        """(digest, kind) that a model's name stands for."""
        names.parse(MODEL, name, field)
        ref = get_ref(self._store, name)
        if ref is None:
            raise NotFound(f"there is no model {name}", reason="MODEL_NOT_FOUND", metadata={"name": name})
        return ref.body["digest"], ref.body["kind"]

    # ------------------------------------------------------------------------------------------ engine servers

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """An orderly end stops the engines too, and the next start brings them back; not so on a cluster, where it is
        the end of one replica, and the next finds them serving."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._keep_engines:
            return
        records = [r for r in self._records.find(KIND) if r.body["handle"]]
        for record in records:
            self._launcher.stop(record.body["handle"], STOP_GRACE_S)
        deadline = time.monotonic() + STOP_GRACE_S + 1
        while time.monotonic() < deadline and any(self._launcher.alive(r.body["handle"]) for r in records):
            time.sleep(0.05)
        for record in records:
            if record.state != "STOPPING":
                # What was asked to end has not failed: the next service starts it at once.
                changes = _with(record, handle=None, address="", given_up=record.body["attempt"])
                self._records.update(replace(changes, state="STARTING"))

    def _look_after(self) -> None:
        while not self._stopping.wait(TICK_S):
            try:
                self.tick()
            except QuartetError as error:
                log.warning("endpoints: %s", error.message)
                self._stopping.wait(2.0)
            except Exception:
                log.exception("a defect in looking after endpoints")
                self._stopping.wait(2.0)

    def tick(self) -> None:
        """Bring every endpoint one step nearer to what is wanted of it; one that cannot holds no other up."""
        trouble: Exception | None = None
        for record in self._records.find(KIND, states=("STARTING", "READY", "STOPPING")):
            try:
                self._step(record)
            except Aborted:
                continue  # it was written meanwhile: the next tick reads it anew
            except Exception as error:
                trouble = error
        if trouble is not None:
            raise trouble

    def _step(self, record: Record) -> None:
        if record.state == "STOPPING":
            self._end(record)
            return
        handle = record.body["handle"] or self._adopt(record)
        if handle is None:
            if record.body["not_before"] <= time.time():
                self._launch(record)
        elif not self._launcher.alive(handle):
            self._died(record, handle)
        elif record.state == "STARTING":
            self._ready(record, handle)
        elif not settled(record) and record.name not in self._settling:
            # Loading takes its time, and other endpoints should not wait for it.
            self._settling.add(record.name)
            threading.Thread(target=self._settle, args=(record,), daemon=True).start()

    def _settle(self, record: Record) -> None:
        try:
            self._records.update(settle_one(record, self._engines))
        except Aborted:
            pass  # it was written meanwhile: the next tick reads it anew
        except QuartetError as error:
            log.warning("%s: %s", record.name, error.message)
        finally:
            self._settling.discard(record.name)

    def _end(self, record: Record) -> None:
        """Stop the engine, and forget the endpoint once it is gone."""
        # An engine that is just being born reads the fence after its claim: either it is seen here or it sees this.
        progress.raise_fence(self._store, record.body["key"], record.body["attempt"] + 1)
        handle = record.body["handle"] or self._adopt(record)
        if handle is None or not self._launcher.alive(handle):
            self._records.delete(record.name)
        elif record.body["key"] not in self._asked:
            self._asked.add(record.body["key"])
            self._launcher.stop(handle, STOP_GRACE_S)

    def _adopt(self, record: Record) -> dict[str, Any] | None:
        """An engine that was started just before the service was cut, if it is known."""
        if record.body["attempt"] == 0 or record.body.get("given_up") == record.body["attempt"]:
            return None
        claim = progress.read_claim(self._store, record.body["key"], record.body["attempt"])
        return self._launcher.find(self._process_name(record), claim)

    def _launch(self, record: Record) -> None:
        spec, key, attempt = record.body["spec"], record.body["key"], record.body["attempt"] + 1
        record = self._records.update(_with(record, attempt=attempt, launched=time.time(), ordered=spec["adapters"]))
        progress.raise_fence(self._store, key, attempt)
        order = {
            "kind": "serve",
            "endpoint": record.name,
            "model": {"name": spec["model"], "digest": spec["digest"]},
            "adapters": spec["adapters"],
            "dtype": spec["dtype"],
            "bits": spec["bits"],
            "token_file": self._token_file,
        }
        self._store.put(f"{progress.attempt_key(key, attempt)}/run.json", progress.dump(order))
        uri = progress.run_uri(self._store.uri, key, attempt)
        command = [sys.executable, "-m", "services.inference.engines", uri]
        handle = self._launcher.launch(command, self._process_name(record), {})
        try:
            self._records.update(_with(record, handle=handle))
        except Aborted:
            # It was deleted meanwhile, by somebody who could not know of this engine.
            self._launcher.stop(handle, 0)
            raise

    def _ready(self, record: Record, handle: dict[str, Any]) -> None:
        key = progress.attempt_key(record.body["key"], record.body["attempt"])
        told = self._store.get(f"{key}/ready.json")
        if told is not None:
            ready = json.loads(told.data)
            if self._engines.answers(ready["address"]):
                serving = _with(record, **ready, handle=handle, applied=record.body["ordered"])
                self._records.update(replace(serving, state="READY"))

    def _died(self, record: Record, handle: dict[str, Any]) -> None:
        """Try again with growing pauses; give up when it says why it cannot, or keeps dying young. One that its place
        took away is simply started again."""
        outcome = progress.read_outcome(self._store, record.body["key"])
        if outcome is not None:
            error = outcome[1].error or Internal("the engine ended", reason="ENGINE_LOST").to_json()
            self._records.update(replace(_with(record, error=error, handle=None, address=""), state="FAILED"))
            return
        taken = self._launcher.disrupted(handle)
        if taken:
            self._launcher.stop(handle, 0)  # its place may be about to make it again
        young = time.time() - record.body["launched"] < YOUNG_S and not taken
        failures = record.body["failures"] + 1 if young else 1
        if failures >= QUICK_FAILURES:
            tail = self._launcher.tail(self._process_name(record), 5)
            said = f"; the last time it said: {tail}" if tail else " without a word"
            error = Internal(f"the engine died {failures} times in a row{said}", reason="ENGINE_LOST").to_json()
            self._records.update(replace(_with(record, error=error, handle=None, address=""), state="FAILED"))
            return
        pause = min(2.0 ** (failures - 1), 30.0)
        changed = _with(
            record,
            failures=failures,
            not_before=time.time() + pause,
            handle=None,
            address="",
            given_up=record.body["attempt"],
        )
        self._records.update(replace(changed, state="STARTING"))

    def _process_name(self, record: Record) -> str:
        return f"{record.body['key'].removeprefix('jobs/')}-{record.body['attempt']}"


def _with(record: Record, **changes: Any) -> Record:
    return replace(record, body={**record.body, **changes})


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
    field = f"{where}.alias"
    return InvalidArgument(
        f"{field}: {why}", reason="ALIAS_MALFORMED", violations=[Violation(field, why, "ALIAS_MALFORMED")]
    )
