"""What records of jobs and endpoints need besides names: holds in the store, one a record (services.finetune.store.holds).

A record's body has its place in the store as "key".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from services.common.records import Record, Records
from services.finetune.errors import QuartetError, Unavailable
from services.finetune.store import Store
from services.finetune.store.holds import hold, list_holds, release

UNBORN_S = 600.0
"""A hold of no record may be that of one which is just being made; not after so many seconds."""

Needs = Callable[[Record], Set[str]]
"""The digests that a record needs as it is now."""


def take(store: Store, record: Record, digests: Set[str]) -> None:
    """Hold these digests for a record, and no others."""
    if digests:
        hold(store, _place(record), record.name, digests)
    else:
        let_go(store, record)


def let_go(store: Store, record: Record) -> None:
    release(store, _place(record))


@contextmanager
def taken(store: Store, record: Record, digests: Set[str]) -> Iterator[None]:
    """Hold them around the making of a record; if it surely was not made, they are let go."""
    take(store, record, digests)
    try:
        yield
    except Unavailable:
        raise  # it may have been made all the same
    except QuartetError:
        let_go(store, record)
        raise


def mend(store: Store, records: Records, kind: str, needs: Needs) -> None:
    """Make the holds of a kind what its records need: a crash may have come between the two. For a service's start."""
    mine = [h for h in list_holds(store) if f".{kind}s." in h.place]
    kept = {_place(record): record for record in records.find(kind)}
    held = {h.place for h in mine}
    for place, record in kept.items():
        if place not in held and (digests := needs(record)):
            take(store, record, digests)
    old_s = store.clock_s() - UNBORN_S
    for h in mine:
        if h.time_s < old_s and (h.place not in kept or not needs(kept[h.place])):
            release(store, h.place)


def _place(record: Record) -> str:
    return str(record.body["key"]).removeprefix("jobs/")
