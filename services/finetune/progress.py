"""How a worker tells what it does, and how a service reads it: the store is the only channel between them.

Under ``jobs/<id>/`` in the store:

    lease.json                       {"attempt": n, "outcome": null | {...}}: who may publish, and what was published
    attempts/<n>/run.json            the order
    attempts/<n>/claim.json          who runs it: {"host", "pid", "start_ticks", "address"?}; written once
    attempts/<n>/events/<seq>.jsonl  what happened, in numbered segments, each written once and whole
    attempts/<n>/checkpoints/<step>.json  {"step", "digest", "loss", "validation_loss"?, "report"?}
    attempts/<n>/fault.json          the error that ended an attempt, if another attempt may do better

The fence: the service raises `attempt` in the lease by a conditional put before it starts an attempt; a worker
publishes its outcome by a conditional put on the lease it saw. Of a zombie and its successor exactly one can win.
Everything else a worker writes lies under its own attempt, where a zombie disturbs nobody.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from services.finetune.errors import Aborted, DeadlineExceeded, QuartetError
from services.finetune.store.port import Store

FLUSH_S = 1.0
"""A segment is written at the latest so long after its first event; services show progress this much behind."""

CLAIM_S = 900.0
"""The machines of one attempt may start so far apart."""

Event = dict[str, Any]
"""{"time": seconds since 1970, "type": metric | log | sample | checkpoint | dataset | report | progress | ready,
and its own fields}."""


class Fenced(Aborted):
    """Another attempt owns the job now; this one must stop and change nothing."""

    def __init__(self, job_key: str, attempt: int) -> None:
        super().__init__(f"attempt {attempt} of {job_key} no longer owns the job", reason="ATTEMPT_FENCED")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an attempt ended. `state` is SUCCEEDED, FAILED or CANCELLED; `result` its artifact digests by role."""

    state: str
    result: Mapping[str, Any]
    error: Mapping[str, Any] | None = None


# ---------------------------------------------------------------------------------------------- keys


def attempt_key(job_key: str, attempt: int) -> str:
    return f"{job_key}/attempts/{attempt:04d}"


def split_run_uri(uri: str) -> tuple[str, str, int]:
    """(store URI, job key, attempt) of a run.json URI, ``<store>/jobs/<id>/attempts/<n>/run.json``."""
    bare, _, query = uri.partition("?")
    root, jobs, rest = bare.rpartition("/jobs/")
    parts = rest.split("/")
    if not jobs or len(parts) != 4 or parts[1] != "attempts" or parts[3] != "run.json" or not parts[2].isdigit():
        raise ValueError(f"not the URI of a run: {uri!r}; expected <store>/jobs/<id>/attempts/<n>/run.json")
    return root + (f"?{query}" if query else ""), f"jobs/{parts[0]}", int(parts[2])


def run_uri(store_uri: str, job_key: str, attempt: int) -> str:
    bare, _, query = store_uri.partition("?")
    return f"{bare}/{attempt_key(job_key, attempt)}/run.json" + (f"?{query}" if query else "")


# ---------------------------------------------------------------------------------------------- the worker's side


class Attempt:
    """A worker's hold on its attempt: claims it, reports events from any thread, publishes the outcome once.

    Of the several processes of one attempt one speaks for all. Another `follows` it, and publishes nothing but its own
    failure; and one that has a `relay` hands all that it has to say to whoever speaks.
    """

    def __init__(
        self,
        store: Store,
        job_key: str,
        number: int,
        relay: Callable[[Event], None] | None = None,
        follows: bool = False,
    ) -> None:
        self._relay = relay
        self._follows = follows
        self.store = store
        self.job_key = job_key
        self.number = number
        self.key = attempt_key(job_key, number)
        self._pending: list[Event] = []
        self._segment = 0
        self._sending: bytes | None = None
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._flush_forever, name="events", daemon=True)

    def claim(self, who: Mapping[str, Any]) -> None:
        """Take the attempt for this process. Fenced if another attempt is current or another process was first.

        Who follows waits for the claim instead. DeadlineExceeded (ATTEMPT_UNCLAIMED).
        """
        self.check()
        if self._relay is not None or self._follows:
            self._await_claim()
            return
        try:
            self.store.put(f"{self.key}/claim.json", dump(who), if_absent=True)
        except Aborted as error:
            raise Fenced(self.job_key, self.number) from error
        self._thread.start()

    def _await_claim(self) -> None:
        deadline = time.monotonic() + CLAIM_S
        while read_claim(self.store, self.job_key, self.number) is None:
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"nobody claimed attempt {self.number} of {self.job_key} in {CLAIM_S:.0f} s",
                    reason="ATTEMPT_UNCLAIMED",
                )
            time.sleep(0.5)

    def check(self) -> str:
        """The lease's etag while this attempt owns the job and nothing is published, else Fenced."""
        lease = self.store.get(f"{self.job_key}/lease.json")
        if lease is not None:
            body = json.loads(lease.data)
            if body["attempt"] == self.number and body["outcome"] is None:
                return lease.etag
        raise Fenced(self.job_key, self.number)

    def emit(self, type_: str, **fields: Any) -> None:
        """Report an event; it reaches the store within FLUSH_S."""
        self.forward({"time": time.time(), "type": type_, **fields})

    def forward(self, event: Event) -> None:
        """Report an event that another process had to tell."""
        if self._relay is not None:
            self._relay(event)
        elif not self._follows:
            with self._lock:
                self._pending.append(event)
            self._wake.set()
        elif event["type"] == "log":
            print(event["text"], file=sys.stderr, flush=True)

    def beat(self, limited: bool) -> None:
        """Tell whoever watches this process that it gets on; nobody else hears of it. What comes next takes about as
        long as what came before, or, not `limited`, any time."""
        if self._relay is not None:
            self._relay({"type": "beat", "limited": limited})

    def flush(self) -> None:
        """Write what was reported so far."""
        with self._lock:
            if self._sending is None and self._pending:
                self._sending = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in self._pending).encode()
                self._pending.clear()
            if self._sending is not None:
                self._write_segment(f"{self.key}/events/{self._segment:08d}.jsonl", self._sending)
                self._segment += 1
                self._sending = None

    def _write_segment(self, key: str, data: bytes) -> None:
        """Written once: a put whose answer was lost is tried again with the same bytes, and finds them there."""
        try:
            self.store.put(key, data, if_absent=True)
        except Aborted:
            there = self.store.get(key)
            if there is None or there.data != data:
                raise

    def checkpoint(self, step: int, digest: str, loss: float, **more: Any) -> None:
        """Make a complete checkpoint known to later attempts and to the service. `more` is told with it: validation_loss
        if it was looked at, the digest of the report up to it."""
        self.check()
        body = {"step": step, "digest": digest, "loss": loss, **more}
        self.store.put(f"{self.key}/checkpoints/{step:08d}.json", dump(body))
        self.emit("checkpoint", **body)
        with contextlib.suppress(QuartetError):  # the thread tries again
            self.flush()  # at once: who serves what is newest waits for it

    def complain(self, error: QuartetError) -> None:
        """Say why this attempt ends without an outcome, as far as the store still listens."""
        if self._relay is not None:
            self._relay({"type": "fault", "error": error.to_json()})
            return
        with contextlib.suppress(QuartetError):
            self.store.put(f"{self.key}/fault.json", dump(error.to_json()))

    def publish(self, outcome: Outcome) -> None:
        """Write all events, then the outcome. Fenced if another attempt owns the job by now."""
        self.flush()
        body = {"state": outcome.state, "result": dict(outcome.result), "error": outcome.error}
        if self._relay is not None:
            self._relay({"type": "outcome", **body})
            return
        if self._follows and outcome.state != "FAILED":
            return
        try:
            lease = {"attempt": self.number, "outcome": body}
            self.store.put(f"{self.job_key}/lease.json", dump(lease), if_match=self.check())
        except Aborted as error:
            raise Fenced(self.job_key, self.number) from error

    def close(self) -> None:
        """Stop reporting; what is pending is written if the store answers."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush_forever(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._closing.wait(FLUSH_S)
            self._wake.clear()
            try:
                self.flush()
            except QuartetError:
                # The store is away: keep the events and try again; training goes on meanwhile.
                self._closing.wait(FLUSH_S)
                self._wake.set()


# ---------------------------------------------------------------------------------------------- the service's side


def raise_fence(store: Store, job_key: str, attempt: int) -> Outcome | None:
    """Make `attempt` the current one; or, if an earlier one has published already, return what it published."""
    key = f"{job_key}/lease.json"
    while True:
        lease = store.get(key)
        body: dict[str, Any] = json.loads(lease.data) if lease else {"attempt": 0, "outcome": None}
        if body["outcome"] is not None:
            return Outcome(**body["outcome"])
        if body["attempt"] == attempt:
            return None
        if body["attempt"] > attempt:
            raise Fenced(job_key, attempt)
        new = dump({"attempt": attempt, "outcome": None})
        try:
            store.put(key, new, if_match=lease.etag if lease else None, if_absent=lease is None)
        except Aborted:
            continue
        return None


def current_attempt(store: Store, job_key: str) -> int:
    """The attempt that owns a job; 0 before the first."""
    lease = store.get(f"{job_key}/lease.json")
    return int(json.loads(lease.data)["attempt"]) if lease else 0


def read_outcome(store: Store, job_key: str) -> tuple[int, Outcome] | None:
    """(attempt, outcome) once one is published."""
    lease = store.get(f"{job_key}/lease.json")
    body: dict[str, Any] = json.loads(lease.data) if lease else {"outcome": None}
    return (body["attempt"], Outcome(**body["outcome"])) if body["outcome"] is not None else None


def read_claim(store: Store, job_key: str, attempt: int) -> dict[str, Any] | None:
    """Who runs an attempt, once somebody does."""
    claim = store.get(f"{attempt_key(job_key, attempt)}/claim.json")
    return json.loads(claim.data) if claim else None


def read_fault(store: Store, job_key: str, attempt: int) -> dict[str, Any] | None:
    """What an attempt complained of, as QuartetError.to_json wrote it."""
    fault = store.get(f"{attempt_key(job_key, attempt)}/fault.json")
    return json.loads(fault.data) if fault else None


def read_back(store: Store, job_key: str, attempt: int) -> Iterator[Event]:
    """An attempt's events, the last first."""
    keys, after = [], ""
    while page := store.list(f"{attempt_key(job_key, attempt)}/events/", start_after=after):
        keys += [entry.key for entry in page]
        after = keys[-1]
    for key in reversed(keys):
        if segment := store.get(key):
            yield from reversed([json.loads(line) for line in segment.data.decode().splitlines()])


def read_segments(store: Store, job_key: str, attempt: int, after: int) -> Iterator[tuple[int, list[Event]]]:
    """(number, events) of each segment after number `after`, in order; -1 means from the start."""
    number = after + 1
    while segment := store.get(f"{attempt_key(job_key, attempt)}/events/{number:08d}.jsonl"):
        yield number, [json.loads(line) for line in segment.data.decode().splitlines()]
        number += 1


def checkpoints(store: Store, job_key: str, before_attempt: int) -> dict[int, dict[str, Any]]:
    """By step, what earlier attempts of a job said of their checkpoints; of a step taken twice, what was said last."""
    found: dict[int, dict[str, Any]] = {}
    for attempt in range(1, before_attempt):
        for entry in store.list(f"{attempt_key(job_key, attempt)}/checkpoints/"):
            if said := store.get(entry.key):
                body: dict[str, Any] = json.loads(said.data)
                found[body["step"]] = body
    return found


def newest_checkpoint(store: Store, job_key: str, before_attempt: int) -> tuple[int, str] | None:
    """(step, digest) of the furthest checkpoint that earlier attempts of the job completed."""
    found = checkpoints(store, job_key, before_attempt)
    return (max(found), found[max(found)]["digest"]) if found else None


def best_checkpoint(found: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first with the least validation loss, or the least training loss where none was validated."""
    found = list(found)
    looked = [body for body in found if body.get("validation_loss") is not None]
    key = "validation_loss" if looked else "loss"
    return min(looked or found, key=lambda body: (body[key], body["step"]), default=None)


def retained(found: Collection[Mapping[str, Any]], keep_last: int, keep_best: bool) -> set[int]:
    """The steps of the checkpoints to keep; `keep_last` 0 keeps all."""
    kept = {body["step"] for body in found}
    if keep_last:
        kept = set(sorted(kept)[-keep_last:])
        best = best_checkpoint(found) if keep_best else None
        kept |= {best["step"]} if best else set()
    return kept


def dump(data: object) -> bytes:
    """Canonical JSON."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
