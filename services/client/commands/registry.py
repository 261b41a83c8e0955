"""model lineage, gc: what the store holds, and what of it is needed."""

from __future__ import annotations

from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from quartet.conversion.v1 import conversion_pb2

from services.client.commands import connect
from services.client.show import out, plain, table


def lineage(a: Namespace) -> None:
    way = conversion_pb2.GetLineageRequest.Direction
    direction = way.DESCENDANTS if a.descendants else way.ANCESTORS
    with connect(a) as client:
        name = a.model if a.model.startswith("sha256:") else client.name("models", a.model)
        request = conversion_pb2.GetLineageRequest(name=name, direction=direction, depth=a.depth)
        found = client.conversion.GetLineage(request)
    if a.json:
        out(plain(found))
        return
    for line in tree(found, a.descendants):
        print(line)


def tree(found: Any, descendants: bool) -> Iterator[str]:
    """A lineage as lines. What stands below several others is drawn out once; a step that a longer way tells as well is
    left out: an adapter's base is its checkpoint's."""
    nodes = {node.id: node for node in found.nodes}
    below = defaultdict[str, list[tuple[str, Any]]](list)
    for edge in found.edges:
        near, far = (edge.parent, edge.child) if descendants else (edge.child, edge.parent)
        below[near].append((far, edge))
    drawn = set[str]()

    def draw(at: str, title: str, indent: str, bend: str) -> Iterator[str]:
        seen = at in drawn
        drawn.add(at)
        yield f"{indent[:-4]}{bend}{title}{' (see above)' if seen and below[at] else ''}"
        steps = [] if seen else [s for s in below[at] if not _by_another_way(s[0], at, below)]
        for n, (far, edge) in enumerate(steps):
            last = n == len(steps) - 1
            told = f"{edge.role}: {_title(nodes[far], '' if descendants else edge.name)}"
            yield from draw(far, told, indent + ("    " if last else "│   "), "└── " if last else "├── ")

    yield from draw(found.start, _title(nodes[found.start], ""), "", "")
    if found.cut:
        yield "… and more, beyond --depth"


def _by_another_way(far: str, at: str, below: Mapping[str, Sequence[tuple[str, Any]]]) -> bool:
    left, seen = [other for other, _ in below[at] if other != far], set[str]()
    while left:
        step = left.pop()
        if step == far:
            return True
        if step not in seen:
            seen.add(step)
            left += [other for other, _ in below[step]]
    return False


def _title(node: Any, told: str) -> str:
    """A node on a line; `told` is its name when something was made from it."""
    if node.kind == "endpoint":
        return f"{node.id}  endpoint"
    names = ", ".join(node.names) or (f"(was {told})" if told else "(no name)")
    more = [f"from {node.source}"] if node.source else []
    more += [f"config {_short(node.config_digest)}"] if node.config_digest else []
    return "  ".join([names, node.kind or "unknown", _short(node.id), *more])


def _short(digest: str) -> str:
    return digest[:19]


def collect_garbage(a: Namespace) -> None:
    from rich.console import Console

    grace = Duration()
    grace.FromTimedelta(timedelta(hours=a.grace_hours))
    request = conversion_pb2.CollectGarbageRequest(dry_run=a.dry_run, grace=grace)
    told: Any = None
    with connect(a) as client, Console(stderr=True).status("looking", spinner="line") as shown:
        for told in client.conversion.CollectGarbage(request):
            seen = told.live.count + told.young.count + told.dropped.count
            shown.update(f"{told.artifact_count} artifacts reached, {seen} blobs looked at")
    if a.json:
        out({"dry_run": a.dry_run, **plain(told)})
        return
    fate = "would be dropped" if a.dry_run else "dropped"
    kinds = {
        "live": "kept: needed",
        "young": "kept: younger than the grace",
        "dropped": f"{fate}: blobs",
        "uploads": f"{fate}: cut uploads",
        "temporary_files": f"{fate}: temporary files",
        "prepared": f"{fate}: prepared data of revisions that are no more",
    }
    counts = [(title, getattr(told, kind)) for kind, title in kinds.items()]
    table(["what", "count", "MB"], [(title, c.count, f"{c.size_bytes / 1e6:.1f}") for title, c in counts])
