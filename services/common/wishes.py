"""What users ask of a job: changes of its record, which its supervisor (jobs.py) then acts upon.

Each takes the record as read and gives it as it shall be, with the events that tell of it; None where there is nothing to
do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from services.common import names
from services.common.records import Record
from services.finetune.errors import FailedPrecondition, InvalidArgument

TERMINAL = ("SUCCEEDED", "FAILED", "CANCELLED")
KEPT_REQUESTS = 64
"""Ids of requests that a job remembers."""

Change = tuple[Record, Sequence[dict[str, Any]]] | None
Wish = Callable[[Record], Change]


def cancel(job: Record) -> Change:
    """Its worker saves and stops, and it ends CANCELLED. One that has ended stays as it is."""
    return None if job.state in TERMINAL or job.body["cancel"] else (changed(job, cancel=True), ())


def pause(job: Record) -> Change:
    """Its worker saves and stops, and it waits PAUSED without one. FailedPrecondition (JOB_ENDED)."""
    _check_goes_on(job)
    return None if job.state == "PAUSED" or pausing(job) else (changed(job, pause=True), ())


def resume(job: Record) -> Change:
    """A paused job waits for its next attempt, with fresh tries; one that is not paused goes on as it is.

    FailedPrecondition (JOB_ENDED).
    """
    _check_goes_on(job)
    if job.state == "PAUSED":
        again = changed(replace(job, state="QUEUED"), pause=False, lost=0, not_before=0)
        return again, [state_event("QUEUED", job.body["attempt"], "resumed")]
    return (changed(job, pause=False), ()) if pausing(job) else None


def abandon(job: Record) -> Change:
    """A paused job ends at once: no worker is there to stop. Others stay as they are."""
    if job.state != "PAUSED":
        return None
    ended = changed(replace(job, state="CANCELLED"), cancel=True, end_time=names.now())
    return ended, [state_event("CANCELLED", job.body["attempt"], "given up while it was paused")]


def once(wish: Wish, request_id: str, request: str) -> Wish:
    """The same wish, fulfilled once for a request id (AIP-155): coming again, late or in the wrong order, it does nothing.

    InvalidArgument (REQUEST_ID_REUSED) if the id came with another request.
    """

    def fulfil(job: Record) -> Change:
        seen = dict(job.body.get("requests", ()))
        if seen.get(request_id, request) != request:
            raise InvalidArgument(f"request_id {request_id} was used for another request", reason="REQUEST_ID_REUSED")
        if request_id in seen:
            return None
        after, events = wish(job) or (job, ())
        return changed(after, requests=[*seen.items(), (request_id, request)][-KEPT_REQUESTS:]), events

    return fulfil if request_id else wish


def pausing(job: Record) -> bool:
    return bool(job.body.get("pause"))


def changed(job: Record, **changes: Any) -> Record:
    return replace(job, body={**job.body, **changes})


def state_event(state: str, attempt: int, message: str = "") -> dict[str, Any]:
    return {"time": time.time(), "type": "state", "state": state, "message": message, "attempt": attempt}


def _check_goes_on(job: Record) -> None:
    if job.state in TERMINAL or job.body["cancel"]:
        how = f"ended {job.state}" if job.state in TERMINAL else "is being cancelled"
        raise FailedPrecondition(f"{job.name} {how}", reason="JOB_ENDED", metadata={"name": job.name})
