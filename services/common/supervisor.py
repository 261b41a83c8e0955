"""Moves the jobs of one room along: starts their workers, takes in what these tell, and ends, retries or pauses them.

Every step can be cut by kill -9 and is done again by the next supervisor: events get their numbers in the transaction that
moves the reading cursor; attempts are fenced (services.finetune.progress), so starting one too many is harmless; what a
room does on success must bear being done twice.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from services.common import holding, names
from services.common.launchers import ONE, Launcher, Shape
from services.common.leases import Lease
from services.common.records import Record, Records
from services.common.wishes import TERMINAL, changed, pausing, state_event
from services.finetune import progress
from services.finetune.errors import Aborted, Internal, QuartetError, Unavailable
from services.finetune.store import Store
from services.finetune.store.holds import digests_of

log = logging.getLogger("quartet.jobs")

MAX_LOST = 3
TICK_S = 0.2
KEPT_VALUES = ("loss", "total_steps", "eta_s", "tokens_per_s", "peak_memory_bytes")
"""Of a metric event, what a job's record shows of the newest."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a room adds to a job: its worker's verb, its order, and what to do with what comes out."""

    kind: str
    verb: str
    order: Callable[[Record], Mapping[str, Any]]
    succeed: Callable[[Record, Mapping[str, Any]], Mapping[str, Any]]
    """(job, outcome's result) -> changes to the job's body; done again after a crash. An error that trying again
    would not mend makes the job FAILED."""
    notice: Callable[[Record, progress.Event], progress.Event | None] = lambda job, event: event
    """Called for each event before it becomes visible; may change it, or drop it by None."""
    keeps: Callable[[Record], set[str]] = lambda job: set()
    """Digests that an ended job's record is of no use without, and no ref names."""
    shape: Callable[[Record], Shape] = lambda job: ONE
    """How many machines and GPUs an attempt takes."""


class Supervisor:
    """A thread that moves jobs along, between `start` and `stop`; of several replicas that of the one with the lease."""

    def __init__(
        self, records: Records, store: Store, launcher: Launcher, work: Work, *, max_workers: int, grace_s: float
    ) -> None:
        self.records = records
        self.store = store
        self.launcher = launcher
        self.work = work
        self._max_workers = max_workers
        self._grace_s = grace_s
        self._lease = Lease(records, f"{work.kind} jobs")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name=f"{work.kind}-jobs", daemon=True)
        self._asked: set[str] = set()  # attempts that this process has sent a signal
        self._stumbles: Counter[str] = Counter()  # faults met in moving a job, by its name

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop supervising; workers go on, and the next supervisor finds them."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(Unavailable):
            self._lease.release()

    def _supervise(self) -> None:
        mended = False
        while not self._stopping.wait(TICK_S):
            try:
                if not self._lease.held():
                    continue
                if not mended:
                    holding.mend(self.store, self.records, self.work.kind, self.needs)
                    mended = True
                self.tick(self._lease.held)
            except QuartetError as error:
                log.warning("%s: %s", self.work.kind, error.message)
                self._stopping.wait(2.0)
            except Exception:
                log.exception("a defect in supervising %s", self.work.kind)
                self._stopping.wait(2.0)

    def tick(self, leads: Callable[[], bool] = lambda: True) -> None:
        """Move every live job one step, for as long as this is the replica that `leads`."""
        live = self.records.find(self.work.kind, states=("QUEUED", "PREPARING", "RUNNING", "PAUSED"))
        running = sum(job.state in ("PREPARING", "RUNNING") for job in live)
        for job in live:
            waits = job.state == "QUEUED" and not job.body["cancel"] and not pausing(job)
            if waits and (running >= self._max_workers or job.body.get("not_before", 0) > time.time()):
                continue
            if not leads():
                return
            running += waits
            try:
                self._step(job)
            except Aborted:
                continue  # somebody wrote the record meanwhile: the next tick reads it anew
            except Unavailable:
                raise  # the store or the database is away, for every job
            except Exception as error:
                self._stumbled(job, error)

    def _step(self, job: Record) -> None:
        if job.state in ("PREPARING", "RUNNING"):
            self._follow(job)
        elif job.body["cancel"] or (pausing(job) and job.state != "PAUSED"):
            self._withdraw(job)
        elif job.state == "QUEUED":
            self._launch(job)

    def _stumbled(self, job: Record, error: Exception) -> None:
        """A fault of this job's own: the others go on, and it ends if the fault stays."""
        log.error("%s: %s", job.name, error, exc_info=error)
        self._stumbles[job.name] += 1
        if (not isinstance(error, QuartetError) or error.retryable) and self._stumbles[job.name] < MAX_LOST:
            return
        told = error if isinstance(error, QuartetError) else Internal("a defect of the service", reason="INTERNAL")
        job = self.records.get(job.name) or job
        if job.body["handle"]:
            self.launcher.stop(job.body["handle"], self._grace_s)
        self._end(changed(job, error=told.to_json()), "FAILED", told.message)

    def _fence(self, job: Record) -> tuple[Record, progress.Outcome | None]:
        """Shut earlier attempts out, then take in all that they told; the outcome if one was published before.

        In this order nothing can be told after the last look, and an outcome is always of the attempt on record.
        """
        try:
            outcome = progress.raise_fence(self.store, job.body["key"], job.body["attempt"] + 1)
        except progress.Fenced:
            # The database was brought back from a backup, and knows less than the store: go on from there.
            there = progress.current_attempt(self.store, job.body["key"])
            job = self.records.update(changed(job, attempt=there, cursor=-1, handle=None))
            outcome = progress.raise_fence(self.store, job.body["key"], there + 1)
        return self._ingest(job), outcome

    def _withdraw(self, job: Record) -> None:
        """Cancel or pause a job without a worker; it may wait for another try while its last one succeeded unseen."""
        job, outcome = self._fence(job)
        if outcome is not None and (outcome.state == "SUCCEEDED" or not job.body["cancel"]):
            self._finish(job, outcome)
        elif job.body["cancel"]:
            self._end(job, "CANCELLED", "" if job.body["attempt"] else "cancelled before it began")
        else:
            saved = progress.newest_checkpoint(self.store, job.body["key"], job.body["attempt"] + 1)
            told = f"resuming goes on after step {saved[0]}" if saved else "nothing is saved yet; resuming starts anew"
            self._move(job, "PAUSED", told)

    def _launch(self, job: Record) -> None:
        """Begin the next attempt. Each line may be the last before a crash; see `_adopt` for what then happens."""
        job, outcome = self._fence(job)
        if outcome is not None:
            self._finish(job, outcome)
            return
        attempt, key = job.body["attempt"] + 1, job.body["key"]
        job = self._move(changed(job, attempt=attempt, cursor=-1, handle=None, trouble=""), "PREPARING")
        order = f"{progress.attempt_key(key, attempt)}/run.json"
        self.store.put(order, progress.dump(self.work.order(job)))
        uri = progress.run_uri(self.store.uri, key, attempt)
        command = [sys.executable, "-m", "services.finetune", self.work.verb, uri]
        try:
            handle = self.launcher.launch(command, self._process_name(job), {}, self.work.shape(job))
        except Unavailable:
            raise  # perhaps it was started all the same: `_adopt` will see
        except OSError as error:
            self._lost(job, f"it could not be started: {error}")
            return
        self.records.update(changed(job, handle=handle))

    def _follow(self, job: Record) -> None:
        job = job if job.body["handle"] else self._adopt(job)
        handle = job.body["handle"]
        if handle is None:
            return
        # Dead or alive is asked first: what a worker wrote before it died is then surely seen below.
        alive = self.launcher.alive(handle)
        job = self._ingest(job)
        outcome = progress.read_outcome(self.store, job.body["key"])
        # A job is paused when its place is free, so one that was just stopped is waited for.
        if outcome is not None and not (alive and pausing(job) and outcome[1].state == "CANCELLED"):
            self._finish(job, outcome[1])
        elif not alive:
            self._lost(job)
        elif (job.body["cancel"] or pausing(job)) and self._process_name(job) not in self._asked:
            self._asked.add(self._process_name(job))
            self.launcher.stop(handle, self._grace_s)
        elif job.state == "PREPARING":
            self._tell_trouble(job, self.launcher.trouble(handle))

    def _adopt(self, job: Record) -> Record:
        """The service was cut between launching a worker and noting it. A worker that is known is taken over;
        otherwise the attempt is given up: if its worker should still come, the fence stops it."""
        claim = progress.read_claim(self.store, job.body["key"], job.body["attempt"])
        handle = self.launcher.find(self._process_name(job), claim)
        if handle is not None:
            return self.records.update(changed(job, handle=handle))
        return self._move(job, "QUEUED", "the service restarted")

    def _ingest(self, job: Record) -> Record:
        """Number the events of new segments; the cursor moves in the same transaction."""
        attempt = job.body["attempt"]
        if attempt == 0:
            return job
        for segment, events in progress.read_segments(self.store, job.body["key"], attempt, job.body["cursor"]):
            new: list[dict[str, Any]] = []
            if job.state == "PREPARING":
                job = replace(job, state="RUNNING")
                job = changed(job, start_time=job.body.get("start_time") or names.now())
                new.append(state_event("RUNNING", attempt))
            for event in events:
                told = self.work.notice(job, event)
                if told is not None:
                    new.append({**told, "attempt": attempt})
                    job = changed(job, progress={**job.body.get("progress", {}), **_progress(told)})
            job = self.records.update(changed(job, cursor=segment), new)
        return job

    def _finish(self, job: Record, outcome: progress.Outcome) -> None:
        job = self._ingest(job)
        if outcome.state == "SUCCEEDED":
            job = changed(job, **self.work.succeed(job, outcome.result))
            self._end(job, "SUCCEEDED", str(outcome.result.get("message", "")))
        elif outcome.state == "CANCELLED" and not job.body["cancel"]:
            # Somebody else's SIGTERM (a machine going down): the job itself was not cancelled.
            handle = job.body["handle"]
            self._lost(job, taken=handle is None or not self.launcher.broken(handle))
        else:
            error = dict(outcome.error) if outcome.error else None
            self._end(changed(job, error=error), outcome.state, error["message"] if error else "")

    def _lost(self, job: Record, why: str = "", taken: bool = False) -> None:
        """The worker is gone without an outcome, or was stopped by others. One that its place took away does not count
        against the job: on machines that come and go that may happen any number of times."""
        attempt, handle = job.body["attempt"], job.body["handle"]
        taken = taken or (handle is not None and self.launcher.disrupted(handle))
        lost = job.body.get("lost", 0) + (not taken)
        fault = progress.read_fault(self.store, job.body["key"], attempt)
        if job.body["cancel"]:
            self._end(job, "CANCELLED", "the worker had to be killed")
        elif pausing(job):
            self._clear(job)
            self._withdraw(job)
        elif lost >= MAX_LOST and not taken and fault is not None:
            self._end(changed(job, error=fault), "FAILED", fault["message"])
        elif lost >= MAX_LOST and not taken:
            tail = why or self.launcher.tail(self._process_name(job), 5)
            error = Internal(f"{lost} workers were lost; the last said: {tail}", reason="WORKER_LOST")
            self._end(changed(job, error=error.to_json()), "FAILED", error.message)
        else:
            self._clear(job)
            job = changed(job, lost=lost, not_before=time.time() + 2.0**lost)
            gone = f"the worker of attempt {attempt} was {'taken away' if taken else 'lost'}"
            self._move(job, "QUEUED", f"attempt {attempt} ended: {fault['message']}" if fault else gone)

    def _clear(self, job: Record) -> None:
        """Make way for another attempt."""
        if job.body["handle"] is not None:
            # What may be left of it, or be made again by its place.
            self.launcher.stop(job.body["handle"], self._grace_s)
        self._reopen(job)

    def _tell_trouble(self, job: Record, told: str) -> None:
        if told == job.body.get("trouble", ""):
            return
        event = {"time": time.time(), "type": "log", "level": "warning", "text": told, "attempt": job.body["attempt"]}
        self.records.update(changed(job, trouble=told), [event] if told else ())

    def _reopen(self, job: Record) -> None:
        """Take back a CANCELLED that nobody asked for, so that another attempt may publish."""
        key = f"{job.body['key']}/lease.json"
        lease = self.store.get(key)
        if lease is not None and progress.read_outcome(self.store, job.body["key"]) is not None:
            body = progress.dump({"attempt": job.body["attempt"], "outcome": None})
            self.store.put(key, body, if_match=lease.etag)

    def _move(self, job: Record, state: str, message: str = "") -> Record:
        event = state_event(state, job.body["attempt"], message)
        return self.records.update(replace(job, state=state), [event])

    def _end(self, job: Record, state: str, message: str = "") -> None:
        kept = self.work.keeps(replace(job, state=state))
        if kept:
            holding.take(self.store, job, kept)
        self._move(changed(job, end_time=names.now()), state, message)
        if not kept:
            holding.let_go(self.store, job)

    def needs(self, job: Record) -> set[str]:
        """Digests that a job is of no use without."""
        return self.work.keeps(job) if job.state in TERMINAL else digests_of(job.body["spec"].get("run"))

    def _process_name(self, job: Record) -> str:
        return f"{job.body['key'].removeprefix('jobs/')}-{job.body['attempt']}"


def _progress(event: Mapping[str, Any]) -> dict[str, Any]:
    if event["type"] == "metric":
        values = {k: v for k, v in event["values"].items() if k in KEPT_VALUES}
        return {"step": event["step"], **values}
    if event["type"] == "progress":
        return {k: event[k] for k in ("done_bytes", "total_bytes", "done_rows", "total_rows") if k in event}
    return {}
