"""Adapters of an endpoint while it answers: what is wanted stands in its record, and the engine is brought to it.

`spec.adapters` are wanted, `ordered` is what the engine was started with, `applied` what it serves. One difference is
settled at a time and noted, so a cut at any point leaves less to do and nothing to undo.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from services.common.records import Record
from services.finetune.errors import NotFound, QuartetError

Adapter = Mapping[str, str]
"""{"alias", "name", "digest"}"""


class Engines(Protocol):
    """What this room asks of engine servers. Errors are the engine's own, or Unavailable (ENGINE_LOST)."""

    def answers(self, address: str) -> bool:
        """Whether the server at `address` says that it serves."""

    def load(self, address: str, endpoint: str, adapter: Adapter) -> None:
        """Have it serve an adapter; done twice is done once."""

    def unload(self, address: str, endpoint: str, alias: str) -> None:
        """Have it serve nothing under an alias. NotFound if it does not."""


def wanted(record: Record) -> list[Adapter]:
    adapters: list[Adapter] = record.body["spec"]["adapters"]
    return adapters


def needs(record: Record) -> set[str]:
    """The digests of all that an endpoint serves or shall serve."""
    adapters = [*wanted(record), *(record.body.get("applied") or ())]
    return {record.body["spec"]["digest"], *(a["digest"] for a in adapters)}


def with_adapter(adapters: Sequence[Adapter], new: Adapter) -> list[Adapter]:
    """`new` in place of what has its alias, else at the end."""
    known = any(a["alias"] == new["alias"] for a in adapters)
    return [new if a["alias"] == new["alias"] else a for a in adapters] + ([] if known else [new])


def without_adapter(adapters: Sequence[Adapter], alias: str, endpoint: str) -> list[Adapter]:
    """NotFound (ADAPTER_NOT_FOUND)."""
    if all(a["alias"] != alias for a in adapters):
        known = ", ".join(a["alias"] for a in adapters) or "none"
        raise NotFound(
            f"{endpoint} has no adapter {alias[:100]!r}; there are: {known}",
            reason="ADAPTER_NOT_FOUND",
            metadata={"adapter": alias[:100]},
        )
    return [a for a in adapters if a["alias"] != alias]


def changed(record: Record, adapters: Sequence[Adapter], change: str) -> Record:
    """The record that wants `adapters`; `change` names the wish, so that who made it learns if the engine refuses."""
    body = {**record.body, "change": change, "refused": None}
    return replace(record, body={**body, "spec": {**body["spec"], "adapters": list(adapters)}})


def settled(record: Record) -> bool:
    return bool(record.body.get("applied") == wanted(record))


def settle_one(record: Record, engines: Engines) -> Record:
    """Bring the engine one adapter nearer to what is wanted; the record that says so.

    What the engine refuses for good is wanted no longer. Unavailable errors pass through: there is a next time.
    """
    address, applied = record.body["address"], list(record.body["applied"])
    for old in applied:
        if all(a["alias"] != old["alias"] for a in wanted(record)):
            with contextlib.suppress(NotFound):
                engines.unload(address, record.name, old["alias"])
            return _noted(record, [a for a in applied if a is not old])
    new = next(a for a in wanted(record) if a not in applied)
    try:
        engines.load(address, record.name, new)
    except QuartetError as error:
        if error.retryable:
            raise
        before = next((a for a in applied if a["alias"] == new["alias"]), None)
        kept = [before if a is new else a for a in wanted(record)]
        refused = {"change": record.body["change"], "error": error.to_json()}
        undone = changed(record, [a for a in kept if a is not None], record.body["change"])
        return replace(undone, body={**undone.body, "refused": refused})
    return _noted(record, with_adapter(applied, new))


def _noted(record: Record, applied: list[Adapter]) -> Record:
    # In the order that is wanted, so that being settled is being equal.
    order = [a["alias"] for a in wanted(record)]
    ranked: list[Any] = sorted(applied, key=lambda a: order.index(a["alias"]) if a["alias"] in order else -1)
    return replace(record, body={**record.body, "applied": ranked})
