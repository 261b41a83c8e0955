"""Holds: who needs which artifacts, besides names.

A job, or an endpoint, works with digests. The name that a digest was found by may be deleted meanwhile, so before it
exists it writes ``holds/<its place>.json`` = {"holder": resource name, "digests": [...]}, looks its names up again, and
takes the hold away after it ended. Whoever deletes a name looks for holds after the name is gone. So of a name's deletion
and a holder's creation at least one sees the other, and no lock is needed (docs/decisions/0056).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from services.finetune.store.port import Store

PREFIX = "holds/"


@dataclass(frozen=True, slots=True)
class Hold:
    """`place` is the holder's own word for itself, never used twice; `time_s` when the hold was written last."""

    place: str
    holder: str
    digests: frozenset[str]
    time_s: float


def hold(store: Store, place: str, holder: str, digests: Iterable[str]) -> None:
    """Need these artifacts or blobs from now on, and no others."""
    body = {"holder": holder, "digests": sorted(set(digests))}
    store.put(f"{PREFIX}{place}.json", json.dumps(body, sort_keys=True).encode())


def release(store: Store, place: str) -> None:
    """Need nothing any more."""
    store.delete(f"{PREFIX}{place}.json")


def list_holds(store: Store) -> Iterator[Hold]:
    """All holds that exist now."""
    start = ""
    while entries := store.list(PREFIX, start_after=start):
        for entry in entries:
            if (found := store.get(entry.key)) is not None:
                body = json.loads(found.data)
                place = entry.key.removeprefix(PREFIX).removesuffix(".json")
                yield Hold(place, body["holder"], frozenset(body["digests"]), entry.time_s)
        start = entries[-1].key


def digests_of(order: object) -> set[str]:
    """Every digest that an order names: the "digest" of each object in it."""
    if isinstance(order, dict):
        own: Any = order.get("digest")
        found = {own} if isinstance(own, str) and own.startswith("sha256:") else set()
        return found.union(*map(digests_of, order.values()))
    if isinstance(order, list | tuple):
        return set().union(*map(digests_of, order))
    return set()
