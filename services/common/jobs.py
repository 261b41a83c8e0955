"""The life of a job, the same for training and conversion.

QUEUED -> PREPARING -> RUNNING -> SUCCEEDED | FAILED | CANCELLED
   ^__________|___________|  (the worker was lost: another attempt, after a while)
   ^--> PAUSED <----------'  (on request, from any of the three; back on request)
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from services.common import holding, names, wishes
from services.common.launchers import Launcher
from services.common.paging import page
from services.common.records import Record, Records
from services.common.supervisor import Supervisor, Work
from services.common.wishes import TERMINAL, changed, state_event
from services.finetune.errors import Aborted, AlreadyExists, FailedPrecondition, NotFound, OutOfRange
from services.finetune.store import Store


class Jobs:
    """The jobs of one room, as its use-cases see them; `supervisor` moves them along between `start` and `stop`."""

    def __init__(
        self, records: Records, store: Store, launcher: Launcher, work: Work, *, max_workers: int, grace_s: float
    ) -> None:
        self.records = records
        self.store = store
        self.work = work
        self.supervisor = Supervisor(records, store, launcher, work, max_workers=max_workers, grace_s=grace_s)
        self.start, self.stop = self.supervisor.start, self.supervisor.stop

    def create(
        self,
        name: str,
        spec: Mapping[str, Any],
        request_id: str,
        request: str,
        result: Mapping[str, Any] | None = None,
        again: Callable[[], object] | None = None,
    ) -> Record:
        """Queue a job; one whose `result` (changes to its body) is known already ends well at once.

        What its order names is held from here on. `again` looks the order's names up once more, for one may have been
        deleted since: it raises what that means, or gives `spec["run"]` as it is now.
        AlreadyExists (JOB_EXISTS), InvalidArgument (REQUEST_ID_REUSED), Aborted (ORDER_CHANGED).
        """
        body = {"spec": dict(spec), "attempt": 0, "cursor": -1, "handle": None, "cancel": False, "key": job_key(name)}
        job, events = Record(name, self.work.kind, "QUEUED", body), [state_event("QUEUED", 0)]
        if result is not None:
            job = changed(replace(job, state="SUCCEEDED"), **result, end_time=names.now())
            events.append(state_event("SUCCEEDED", 0))
        try:
            with holding.taken(self.store, job, self.supervisor.needs(job)):
                if again is not None and again() != spec["run"]:
                    raise Aborted("what the job names changed meanwhile; ask again", reason="ORDER_CHANGED")
                made = self.records.create(job, request_id, request, events)
        except AlreadyExists as error:
            raise AlreadyExists(error.message, reason="JOB_EXISTS", metadata={"name": name}) from error
        if made.body["key"] != job.body["key"]:
            holding.let_go(self.store, job)  # the same request made one before
        return made

    def get(self, name: str) -> Record:
        """A job. NotFound (JOB_NOT_FOUND)."""
        record = self.records.get(name)
        if record is None or record.kind != self.work.kind:
            raise NotFound(f"there is no job {name}", reason="JOB_NOT_FOUND", metadata={"name": name})
        return record

    def page(self, parent: str, **paging: Any) -> tuple[Sequence[Record], str]:
        """Some of a workspace's jobs, newest first, and the token of the rest; see services.common.paging."""
        names.parse("workspaces/{workspace}", parent, "parent")

        def fields(r: Record) -> Mapping[str, Any]:
            return {**r.body["spec"], "name": r.name, "state": r.state, "create_time": r.create_time}

        return page(
            self.records.find(self.work.kind, parent + "/"),
            fields=fields,
            orders=["create_time"],
            default_order="create_time desc",
            **paging,
        )

    def ask(self, name: str, wish: wishes.Wish) -> Record:
        """Change a job by one of services.common.wishes, whose errors it raises; the supervisor does the rest."""
        while True:
            job = self.get(name)
            try:
                change = wish(job)
                return self.records.update(*change) if change else job
            except Aborted:
                continue  # somebody else wrote meanwhile

    def cancel(self, name: str) -> Record:
        """Ask a job to end."""
        return self.ask(name, wishes.cancel)

    def delete(self, name: str, etag: str, forget: Callable[[], None] = lambda: None) -> None:
        """Forget an ended or paused job, after what `forget` does away with: a crash between them leaves a job to delete
        again.

        FailedPrecondition (JOB_NOT_ENDED), Aborted (ETAG_MISMATCH).
        """
        job = self.get(name)
        if etag and etag != job.etag:
            raise Aborted(f"{name} changed meanwhile; read it again", reason="ETAG_MISMATCH")
        if change := wishes.abandon(job):
            job = self.records.update(*change)  # from here on nobody can resume it
        if job.state not in TERMINAL:
            raise FailedPrecondition(f"{name} is {job.state}; cancel it first", reason="JOB_NOT_ENDED")
        forget()
        self.records.delete(name, job.etag if etag else "")
        holding.let_go(self.store, job)

    def watch(self, name: str, after: int) -> Iterator[list[tuple[int, dict[str, Any]]]]:
        """Batches of (sequence, event), empty ones while nothing happens; ends after the terminal state's event.

        Each step is one quick query: the caller sleeps between them. OutOfRange (SEQUENCE_UNKNOWN).
        """
        self.get(name)
        if after < 0 or (after and not self.records.events(name, after - 1, 1)):
            raise OutOfRange(f"{name} has no event {after}", reason="SEQUENCE_UNKNOWN")
        while True:
            batch = self.records.events(name, after)
            yield batch
            for sequence, event in batch:
                after = sequence
                if event.get("state") in TERMINAL:
                    return
            if not batch and self.get(name).state in TERMINAL and not self.records.events(name, after, 1):
                return


def job_key(name: str) -> str:
    """Where a new job lives in the store: a deleted job's name may be used again, its place never is."""
    return "jobs/" + ".".join(name.split("/")[1:]) + "." + uuid.uuid4().hex[:8]
