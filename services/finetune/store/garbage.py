"""The collector of garbage: bytes that nothing reaches any more, and what cut writes left behind.

What is reached, from: refs; holds, and what the places of their holders tell (services.finetune.progress); prepared data
of revisions that are reached. An adapter and a checkpoint reach their base. Manifests are never dropped: they are small,
and they are the history (docs/decisions/0057).

Beside writers it is safe: what was stored or touched within the grace stays, whatever names it. It may be cut anywhere;
what is left is garbage still.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from services.finetune.errors import Aborted, FailedPrecondition, NotFound, QuartetError
from services.finetune.store.artifacts import NEEDS_BASE, load
from services.finetune.store.holds import digests_of, list_holds
from services.finetune.store.port import Entry, Store

GRACE_S = 24 * 3600.0
LEAST_GRACE_S = 3600.0
BATCH = 100
TURN = "garbage/collector.json"
BEAT_S = 5.0
STALE_S = 60.0
"""A collector that was not heard of for so long is dead, and another may begin."""


@dataclass(frozen=True, slots=True)
class Counted:
    count: int = 0
    size: int = 0

    def plus(self, size: int, count: int = 1) -> Counted:
        return Counted(self.count + count, self.size + size)


@dataclass(frozen=True, slots=True)
class Report:
    """What was found so far; sizes in bytes. `young` are blobs that nothing reaches, within the grace; `prepared` entries
    have no bytes of their own: their blocks are among `garbage`."""

    phase: Literal["MARKING", "SWEEPING", "DONE"] = "MARKING"
    artifacts: int = 0
    live: Counted = Counted()
    young: Counted = Counted()
    garbage: Counted = Counted()
    uploads: Counted = Counted()
    temporary: Counted = Counted()
    prepared: Counted = Counted()


def collect(store: Store, grace_s: float, dry_run: bool) -> Iterator[Report]:
    """Look for garbage older than `grace_s`, and unless `dry_run` drop it; ever newer reports, the last one DONE.

    FailedPrecondition (COLLECTOR_BUSY), DataLoss (MANIFEST_CORRUPT) before anything is dropped.
    """
    before_s = store.clock_s() - grace_s
    with contextlib.nullcontext(_Turn(None, "")) if dry_run else _turn(store) as turn:
        reached, found = _mark(store)
        yield (report := Report(artifacts=len(found)))
        shelves, stale = _shelves(store, found, before_s)
        reached |= shelves
        for entry in stale:
            if not dry_run:
                with contextlib.suppress(Aborted):  # it is made anew just now
                    store.delete(entry.key, if_match=entry.etag)
            report = replace(report, prepared=report.prepared.plus(0))
        report = replace(report, phase="SWEEPING")
        report = yield from _sweep(store, report, reached, before_s, turn)
        for left in store.leftovers(before_s, drop=not dry_run):
            kind = "uploads" if left.kind == "upload" else "temporary"
            report = replace(report, **{kind: getattr(report, kind).plus(left.size)})
            turn.beat()
        yield replace(report, phase="DONE")


# ---------------------------------------------------------------------------------------------- what is reached


def _mark(store: Store) -> tuple[set[str], set[str]]:
    """(blobs, artifacts) that refs and holds reach.

    Refs are read before holds and again after them: a holder that ends has bound its result's name before it lets go, and
    one that begins looks its names up again after it holds (services.finetune.store.holds). So both are seen.
    """
    refs: dict[str, tuple[str, set[str]]] = {}
    _read_refs(store, refs)
    roots = set[str]()
    for hold in list(list_holds(store)):
        roots |= hold.digests | _told(store, f"jobs/{hold.place}")
    _read_refs(store, refs)
    return _reach(store, roots.union(*(digests for _, digests in refs.values())))


def _read_refs(store: Store, refs: dict[str, tuple[str, set[str]]]) -> None:
    """Add what each ref names, and what one that changed names now."""
    for entry in _entries(store, "refs/"):
        if entry.key not in refs or refs[entry.key][0] != entry.etag:
            before = refs[entry.key][1] if entry.key in refs else set()
            found = store.get(entry.key)
            refs[entry.key] = (entry.etag, before | (digests_of(json.loads(found.data)) if found else set()))


def _told(store: Store, place: str) -> set[str]:
    """What the workers of a job that has not ended made, and no ref may name yet."""
    found = set[str]()
    for entry in _entries(store, f"{place}/"):
        if "/events/" not in entry.key:
            told = store.get(entry.key)
            found |= _any_digest(json.loads(told.data)) if told else set()
    return found


def _any_digest(told: object) -> set[str]:
    """Each digest in a worker's words, whatever it is called there."""
    if isinstance(told, str):
        return {told} if told.startswith("sha256:") else set()
    inner: Iterable[Any] = told.values() if isinstance(told, dict) else told if isinstance(told, list) else ()
    return set[str]().union(*map(_any_digest, inner))


def _reach(store: Store, roots: Iterable[str]) -> tuple[set[str], set[str]]:
    blobs, artifacts, left = set[str](), set[str](), list(roots)
    while left:
        digest = left.pop()
        if digest in blobs:
            continue
        blobs.add(digest)  # it may be a blob's own, as of a report
        try:
            manifest = load(store, digest)
        except NotFound:
            continue
        artifacts.add(digest)
        blobs.update(f.digest for f in manifest.files)
        if manifest.kind in NEEDS_BASE:
            left += [p.digest for p in manifest.parents if p.role == "base"]
    return blobs, artifacts


def _shelves(store: Store, found: set[str], before_s: float) -> tuple[set[str], list[Entry]]:
    """(blobs of prepared data whose revisions are all reached, entries of old prepared data whose are not)."""
    blobs, stale = set[str](), list[Entry]()
    for entry in _entries(store, "prepared/"):
        told = store.get(entry.key)
        digest = json.loads(told.data)["digest"] if told else None
        if digest is None:
            continue  # somebody makes it now
        try:
            manifest = load(store, digest)
        except NotFound:
            continue
        sources = {p.digest for p in manifest.parents if p.role == "dataset"}
        if sources <= found or entry.time_s >= before_s:
            blobs.update(f.digest for f in manifest.files)
        else:
            stale.append(entry)
    return blobs, stale


def _entries(store: Store, prefix: str) -> Iterator[Entry]:
    start = ""
    while entries := store.list(prefix, start_after=start):
        yield from entries
        start = entries[-1].key


# ---------------------------------------------------------------------------------------------- dropping


def _sweep(
    store: Store, report: Report, reached: set[str], before_s: float, turn: _Turn
) -> Generator[Report, None, Report]:
    """Look at each blob; those that are neither reached nor young are dropped, if it is our turn to."""
    batch: list[str] = []

    def drop() -> None:
        turn.beat(now=True)
        if turn.store is not None:
            store.drop_blobs(batch, before_s)
        batch.clear()

    for n, blob in enumerate(store.list_blobs()):
        if blob.digest in reached:
            report = replace(report, live=report.live.plus(blob.size))
        elif blob.time_s >= before_s:
            report = replace(report, young=report.young.plus(blob.size))
        else:
            report = replace(report, garbage=report.garbage.plus(blob.size))
            batch.append(blob.digest)
            if len(batch) == BATCH:
                drop()
        if n % BATCH == BATCH - 1:
            yield report
            turn.beat()
    drop()
    return report


class _Turn:
    """The right to drop, which one collector has at a time; without a store it is of one who only looks."""

    def __init__(self, store: Store | None, etag: str) -> None:
        self.store = store
        self.etag = etag
        self._beaten = time.monotonic()

    def beat(self, now: bool = False) -> None:
        """Show that we are alive. FailedPrecondition (COLLECTOR_BUSY) if another took over."""
        if self.store is None or (not now and time.monotonic() - self._beaten < BEAT_S):
            return
        self._beaten = time.monotonic()
        try:
            self.etag = self.store.put(TURN, _beat(), if_match=self.etag)
        except Aborted as error:
            raise _busy() from error


@contextlib.contextmanager
def _turn(store: Store) -> Iterator[_Turn]:
    present = next((e for e in store.list(TURN) if e.key == TURN), None)
    if present is not None and store.clock_s() - present.time_s < STALE_S:
        raise _busy()
    try:
        mine = _beat()
        etag = store.put(TURN, mine, if_match=present.etag if present else None, if_absent=present is None)
    except Aborted as error:
        raise _busy() from error
    turn = _Turn(store, etag)
    try:
        yield turn
    finally:
        with contextlib.suppress(QuartetError):
            store.delete(TURN, if_match=turn.etag)


def _beat() -> bytes:
    return json.dumps({"beat": uuid.uuid4().hex}).encode()


def _busy() -> FailedPrecondition:
    return FailedPrecondition(
        f"garbage is collected already; one that was killed is taken over after {STALE_S:.0f} s",
        reason="COLLECTOR_BUSY",
    )
