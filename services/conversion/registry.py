"""What the names of the store stand for, who needs a model, and what was made from what.

Refs name artifacts and manifests name their parents, so nothing else is written down: this room reads all refs once, and
from then on those whose etag changed (docs/decisions/0058).
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.finetune.errors import NotFound
from services.finetune.store import Entry, Store
from services.finetune.store.artifacts import NEEDS_BASE, Manifest, Ref, get_ref
from services.finetune.store.holds import list_holds

READERS = 16


@dataclass(frozen=True, slots=True)
class User:
    """Who needs a model: a resource's name, and what for."""

    name: str
    why: str


@dataclass(frozen=True, slots=True)
class Node:
    """An artifact in a lineage, or an endpoint. `refs` name it now; `manifest` is None where it is known by digest only."""

    id: str
    refs: tuple[Ref, ...] = ()
    manifest: Manifest | None = None


@dataclass(frozen=True, slots=True)
class Edge:
    """`child` was made from `parent`, which was its `role` and had that `name` then; both are digests, but an endpoint is
    its own name."""

    child: str
    parent: str
    role: str
    name: str


@dataclass(frozen=True, slots=True)
class Lineage:
    """A part of the history. `cut` says that there is more beyond the depth that was asked for."""

    start: str
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    cut: bool


class Registry:
    """`manifest` gives an artifact's manifest by digest, as artifacts.load does, and may keep it."""

    def __init__(self, store: Store, manifest: Callable[[str], Manifest]) -> None:
        self._store = store
        self._load = manifest
        self._lock = threading.Lock()
        self._refs: dict[str, tuple[str, Ref | None]] = {}

    def refs(self) -> list[Ref]:
        """All refs that name an artifact, as they are now, in the order of their names."""
        with self._lock, ThreadPoolExecutor(READERS) as pool:
            etags = {e.key.removeprefix("refs/").removesuffix(".json"): e.etag for e in self._listed()}
            stale = [name for name, etag in etags.items() if self._refs.get(name, ("",))[0] != etag]
            read = zip(stale, pool.map(lambda name: get_ref(self._store, name), stale), strict=True)
            self._refs = {n: self._refs[n] for n in etags if n in self._refs} | {n: (etags[n], ref) for n, ref in read}
            found = [ref for _, ref in self._refs.values() if ref is not None and "digest" in ref.body]
        return sorted(found, key=lambda ref: ref.name)

    def users(self, name: str, digest: str) -> list[User]:
        """Who needs the model of this name and digest; nobody, if it has another name as well."""
        # Holds first: a job lets go only after its result has a name.
        holders = self._holders(digest)
        refs = self.refs()
        if any(r.name != name and r.body["digest"] == digest and "/models/" in r.name for r in refs):
            return []
        tuned: dict[str, User] = {}
        for ref in refs:
            if digest in self._bases(ref.body["digest"]):
                owner, _, step = ref.name.partition("/checkpoints/")
                tuned[owner] = User(owner, "its checkpoints were trained on it" if step else "it was trained on it")
        return [*tuned.values(), *holders]

    def _holders(self, digest: str) -> list[User]:
        """The endpoints and jobs that work with an artifact, or with one that needs it."""
        return [
            User(held.holder, "it serves it" if "/endpoints/" in held.holder else "it works with it")
            for held in list_holds(self._store)
            if digest in held.digests or any(digest in self._bases(d) for d in held.digests)
        ]

    def _bases(self, digest: str) -> list[str]:
        """What an artifact is of no use without."""
        manifest = self.manifest(digest)
        if manifest is None or manifest.kind not in NEEDS_BASE:
            return []
        return [p.digest for p in manifest.parents if p.role == "base"]

    def manifest(self, digest: str) -> Manifest | None:
        """An artifact's manifest, if there is one."""
        try:
            return self._load(digest)
        except NotFound:
            return None

    def _listed(self) -> Iterator[Entry]:
        start = ""
        while entries := self._store.list("refs/", start_after=start):
            yield from entries
            start = entries[-1].key

    # ------------------------------------------------------------------------------------------ lineage

    def lineage(self, start: str, descendants: bool, depth: int) -> Lineage:
        """What `start`, a digest or an endpoint's name, was made from, or what was made from it. `depth` is in steps; 0
        means all. What has no name any more is found where a descendant of its own has one."""
        named = defaultdict[str, list[Ref]](list)
        for ref in self.refs():
            named[ref.body["digest"]].append(ref)
        served = [
            Edge(held.holder, digest, "served", "")
            for held in list_holds(self._store)
            if "/endpoints/" in held.holder
            for digest in sorted(held.digests)
        ]
        edges = self._history([*named, start], served)
        near = defaultdict[str, list[Edge]](list)
        for edge in edges:
            near[edge.parent if descendants else edge.child].append(edge)
        taken, cut = _walk(start, near, descendants, depth)
        ids = dict.fromkeys([start, *(i for e in taken for i in (e.child, e.parent))])
        nodes = [Node(i, tuple(named.get(i, ())), self.manifest(i)) for i in ids]
        return Lineage(start, tuple(nodes), tuple(taken), cut)

    def _history(self, known: Iterable[str], served: Sequence[Edge]) -> list[Edge]:
        """All edges above what is known and served."""
        edges, seen, left = list(served), set[str](), [*known, *(e.parent for e in served)]
        while left:
            digest = left.pop()
            if digest in seen:
                continue
            seen.add(digest)
            manifest = self.manifest(digest)
            for parent in manifest.parents if manifest is not None else ():
                edges.append(Edge(digest, parent.digest, parent.role, parent.name))
                left.append(parent.digest)
        return edges


def _walk(start: str, near: Mapping[str, Sequence[Edge]], descendants: bool, depth: int) -> tuple[list[Edge], bool]:
    """(the edges within `depth` steps of `start`, whether there are more)."""
    taken, seen, level, step = list[Edge](), {start}, [start], 0
    while level:
        edges = [edge for at in level for edge in near.get(at, ())]
        if depth and step == depth:
            return taken, bool(edges)
        taken += edges
        ends = dict.fromkeys(e.child if descendants else e.parent for e in edges)
        level = [end for end in ends if end not in seen]
        seen.update(level)
        step += 1
    return taken, False
