"""Which adapter stands under which alias. An alias goes over to another version at once; who answers with the old one
ends with it, and the engine forgets a version when nobody needs it any more.

More may be served than the engine holds: what was used longest ago leaves it, and comes back from the store when it is asked
for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.finetune.errors import NotFound
from services.finetune.store import Store
from services.finetune.store.artifacts import Manifest, materialise
from services.inference.engines.port import Engine


@dataclass(frozen=True, slots=True)
class Served:
    """The bare model (alias "") or an adapter on it, as it describes itself."""

    alias: str
    name: str
    digest: str
    manifest: Manifest

    @property
    def key(self) -> str:
        """The engine's name for it: by content, so that no cache can mistake one version for another."""
        return self.digest.removeprefix("sha256:") if self.alias else ""


class Adapters:
    """Aliases of one engine, which has loaded the first `engine.most_adapters` of them. Safe for threads."""

    def __init__(self, engine: Engine, served: Sequence[Served], store: Store) -> None:
        self._engine = engine
        self._store = store
        self._served = {s.alias: s for s in served}
        adapters = dict.fromkeys(s.key for s in served if s.key)
        # In the order of their last use.
        self._loaded = dict.fromkeys(list(adapters)[: engine.most_adapters])
        self._users: Counter[str] = Counter()
        self._guard = threading.Lock()  # of the tables
        self._changing = threading.Lock()  # of what the engine has loaded

    def all(self) -> list[Served]:
        return list(self._served.values())

    def loaded(self) -> int:
        """How many the engine has loaded, those that only answers under way still need included."""
        return len(self._loaded)

    def find(self, alias: str) -> Served:
        """NotFound (ADAPTER_NOT_FOUND)."""
        served = self._served.get(alias)
        if served is None:
            known = ", ".join(a for a in self._served if a) or "none"
            raise NotFound(
                f"no adapter {alias!r} is served here; there are: {known}",
                reason="ADAPTER_NOT_FOUND",
                metadata={"adapter": alias},
            )
        return served

    @contextlib.asynccontextmanager
    async def using(self, alias: str) -> AsyncIterator[Served]:
        """The version that an answer begun now ends with, loaded. NotFound (ADAPTER_NOT_FOUND), the store's Unavailable."""
        with self._guard:
            served = self.find(alias)
            self._users[served.key] += 1
            there = not served.key or served.key in self._loaded
            if there and served.key:
                self._loaded[served.key] = self._loaded.pop(served.key)
        try:
            if not there:
                await asyncio.to_thread(self._load, served)
            yield served
        finally:
            with self._guard:
                self._users[served.key] -= 1
            # Not here: the engine may be in the middle of a step, and answers end on the event loop.
            threading.Thread(target=self._tidy, args=(served.key,), daemon=True).start()

    def put(self, served: Served) -> None:
        """Load an adapter and switch its alias to it. FailedPrecondition (MODEL_NOT_SERVABLE); then nothing changed."""
        with self._guard:
            self._users[served.key] += 1  # until it has its alias
        try:
            self._load(served)
            with self._guard:
                old = self._served.get(served.alias)
                self._served[served.alias] = served
        finally:
            with self._guard:
                self._users[served.key] -= 1
        if old is not None:
            self._tidy(old.key)

    def _load(self, served: Served) -> None:
        with self._changing:
            if served.key in self._loaded:
                return
            with tempfile.TemporaryDirectory(prefix="quartet-") as folder:
                files = materialise(self._store, served.manifest, Path(folder))
                for key in self._idle()[: max(len(self._loaded) + 1 - self._engine.most_adapters, 0)]:
                    self._forget(key)
                self._engine.load(served.key, files)
            with self._guard:
                self._loaded[served.key] = None

    def _idle(self) -> list[str]:
        """What is loaded and not used now; used longest ago first."""
        with self._guard:
            return [key for key in self._loaded if not self._users[key]]

    def _forget(self, key: str) -> None:
        with self._guard:
            if self._users[key]:
                return  # it was asked for just now
            del self._loaded[key]
        self._engine.unload(key)

    def drop(self, alias: str) -> None:
        """Serve no adapter under an alias any more. NotFound (ADAPTER_NOT_FOUND)."""
        with self._guard:
            old = self.find(alias)
            del self._served[alias]
        self._tidy(old.key)

    def _tidy(self, key: str) -> None:
        """Unload a version that has neither an alias nor an answer under way."""
        with self._changing:
            with self._guard:
                needed = self._users[key] > 0 or any(s.key == key for s in self._served.values())
            if not needed and key in self._loaded:
                self._forget(key)
