"""Who looks after endpoints: that each has a living engine server, and that it serves what is wanted.

    STARTING <-> READY          an engine that dies is started again, after growing pauses
        |------> FAILED         it says why it cannot serve, or keeps dying young
    any of them -> STOPPING     DeleteEndpoint; nobody sees it any more, and it is forgotten once its engine is gone

Every step can be cut by kill -9 and is done again by the next service: attempts are fenced (services.finetune.progress),
and an engine that finds itself fenced ends by itself, so none is ever left over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from dataclasses import replace
from typing import Any

from services.common import holding
from services.common.launchers import Launcher
from services.common.leases import Lease
from services.common.records import Record, Records
from services.finetune import progress
from services.finetune.errors import Aborted, Internal, QuartetError, Unavailable
from services.finetune.store import Store
from services.inference.adapters import Engines, needs, settle_one, settled

log = logging.getLogger("quartet.inference")

KIND = "endpoint"
TICK_S = 0.2
QUICK_FAILURES = 5
YOUNG_S = 60.0
STOP_GRACE_S = 5.0


class Keeper:
    """`start` and `stop` its thread. An orderly end stops the engines unless `keep_engines`."""

    def __init__(
        self,
        store: Store,
        records: Records,
        launcher: Launcher,
        token_file: str,
        engines: Engines,
        keep_engines: bool = False,
        vllm_python: str = "",
    ) -> None:
        self._store = store
        self._records = records
        self._launcher = launcher
        self._token_file = token_file
        self._engines = engines
        self._keep_engines = keep_engines
        self._vllm_python = vllm_python
        self._lease = Lease(records, "endpoints")
        self._settling: set[str] = set()  # endpoints whose engine is just told of an adapter
        self._asked: set[str] = set()  # attempts that this process has asked to end
        self._held: dict[str, set[str]] = {}  # what each endpoint holds, by its key
        self._mended = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._look_after, name="endpoints", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """An orderly end stops the engines too, and the next start brings them back; not so on a cluster, where it is
        the end of one replica, and the next finds them serving."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(Unavailable):
            if not self._keep_engines and self._lease.held():
                self._stop_engines()
            self._lease.release()

    def _stop_engines(self) -> None:
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
                if self._lease.held():
                    self.tick()
                else:
                    self._held.clear()  # another replica may hold something else meanwhile
            except QuartetError as error:
                log.warning("endpoints: %s", error.message)
                self._stopping.wait(2.0)
            except Exception:
                log.exception("a defect in looking after endpoints")
                self._stopping.wait(2.0)

    def tick(self) -> None:
        """Bring every endpoint one step nearer to what is wanted of it; one that cannot holds no other up."""
        if not self._mended:
            holding.mend(self._store, self._records, KIND, needs)
            self._mended = True
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
        self._hold(record)
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

    def _hold(self, record: Record) -> None:
        """Let go of adapters that are served no more; what is added was held before it was wished for."""
        key, needed = record.body["key"], needs(record)
        if self._held.get(key) != needed:
            holding.take(self._store, record, needed)
            self._held[key] = needed

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
            holding.let_go(self._store, record)
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
            "engine": spec["engine"],
            "dtype": spec["dtype"],
            "bits": spec["bits"],
            "token_file": self._token_file,
        }
        self._store.put(f"{progress.attempt_key(key, attempt)}/run.json", progress.dump(order))
        uri = progress.run_uri(self._store.uri, key, attempt)
        python = self._vllm_python if spec["engine"] == "vllm" and self._vllm_python else sys.executable
        command = [python, "-m", "services.inference.engines", uri]
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
        again = _with(
            record,
            failures=failures,
            not_before=time.time() + pause,
            handle=None,
            address="",
            given_up=record.body["attempt"],
        )
        self._records.update(replace(again, state="STARTING"))

    def _process_name(self, record: Record) -> str:
        return f"{record.body['key'].removeprefix('jobs/')}-{record.body['attempt']}"


def _with(record: Record, **changes: Any) -> Record:
    return replace(record, body={**record.body, **changes})
