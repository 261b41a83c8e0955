"""Which adapter stands under which alias. An alias goes over to another version at once; who answers with the old one
ends with it, and the engine forgets a version when nobody needs it any more."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.finetune.errors import NotFound
from services.finetune.store.artifacts import Manifest
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
    """Aliases of one engine, whose adapters are loaded already. Safe for threads."""

    def __init__(self, engine: Engine, served: Sequence[Served]) -> None:
        self._engine = engine
        self._served = {s.alias: s for s in served}
        self._loaded = {s.key for s in served}
        self._users: Counter[str] = Counter()
        self._guard = threading.Lock()  # of the tables
        self._changing = threading.Lock()  # of what the engine has loaded

    def all(self) -> list[Served]:
        return list(self._served.values())

    def loaded(self) -> int:
        """How many the engine has loaded, those that only answers under way still need included."""
        return len(self._loaded - {""})

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

    @contextlib.contextmanager
    def using(self, alias: str) -> Iterator[Served]:
        """The version that an answer begun now ends with. NotFound (ADAPTER_NOT_FOUND)."""
        with self._guard:
            served = self.find(alias)
            self._users[served.key] += 1
        try:
            yield served
        finally:
            with self._guard:
                self._users[served.key] -= 1
            # Not here: the engine may be in the middle of a step, and answers end on the event loop.
            threading.Thread(target=self._tidy, args=(served.key,), daemon=True).start()

    def put(self, served: Served, folder: Path) -> None:
        """Load an adapter and switch its alias to it. FailedPrecondition (MODEL_NOT_SERVABLE); then nothing changed."""
        with self._changing:
            if served.key not in self._loaded:
                self._engine.load(served.key, folder)
                self._loaded.add(served.key)
            with self._guard:
                old = self._served.get(served.alias)
                self._served[served.alias] = served
        if old is not None:
            self._tidy(old.key)

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
                self._engine.unload(key)
                self._loaded.remove(key)
