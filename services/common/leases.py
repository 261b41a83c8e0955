"""Which of a service's replicas does what must be done once.

A lease spares work, it is no lock: a holder that was frozen for longer than it runs may act beside the next one. What is
done under it must bear that, as attempts do, which are fenced, and records, whose every write says what it read.
"""

from __future__ import annotations

import time
import uuid

from services.common.records import Records

LEASE_S = 5.0
"""So long after the death of its holder another replica goes on."""
ASK_S = 1.0


class Lease:
    """One replica's hold on what `name` stands for. Not for several threads at once."""

    def __init__(self, records: Records, name: str) -> None:
        self._records = records
        self._name = name
        self._holder = uuid.uuid4().hex
        self._held = False
        self._ask_at = 0.0

    def held(self) -> bool:
        """Whether this replica has it, which it takes if it is free. Cheap to ask often. Unavailable."""
        now = time.monotonic()
        if now >= self._ask_at:
            self._held = False  # until the database says otherwise, also where it says nothing
            self._held = self._records.hold(self._name, self._holder, LEASE_S)
            self._ask_at = now + (LEASE_S / 3 if self._held else ASK_S)
        return self._held

    def release(self) -> None:
        """Let another replica have it at once."""
        if self._held:
            self._held, self._ask_at = False, float("inf")
            self._records.release(self._name, self._holder)
