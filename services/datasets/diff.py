"""What changed between two revisions: rows by content, in time and memory that grow with the rows and no faster."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from services.datasets.arrivals import local
from services.finetune.formats import Problem
from services.finetune.formats.containers import is_row_file, raw_rows
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[Any]]

SHOWN = 100
TEXT_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Place:
    """A row: its file, where in it, and its JSON, cut at TEXT_CHARS."""

    file: str
    row: int
    text: str


@dataclass(frozen=True, slots=True)
class Diff:
    """Counts, and the first 100 of each kind. A changed row is (newer, older); a file is (path, newer, older digest)."""

    added: int
    removed: int
    changed: int
    unchanged: int
    added_rows: Sequence[Place]
    removed_rows: Sequence[Place]
    changed_rows: Sequence[tuple[Place, Place]]
    files: Sequence[tuple[str, str, str]]


@dataclass(slots=True)
class _Side:
    """The rows of one revision that need comparing: a hash each, and the file and row number they stand at."""

    files: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    hashes: bytearray = field(default_factory=bytearray)
    numbers: bytearray = field(default_factory=bytearray)

    def place(self, index: int) -> tuple[int, int]:
        """(which file, row number) of a row."""
        from bisect import bisect_right

        return bisect_right(self.ends, index), int.from_bytes(self.numbers[8 * index : 8 * index + 8], "little")


def diff(store: Store, newer: Manifest, older: Manifest, rows: tuple[int, int], scratch: Path) -> Diff:
    """Compare two revisions; `rows` is how many each has."""
    same = Counter(f.digest for f in newer.files) & Counter(f.digest for f in older.files)
    ours, theirs = _others(newer, same), _others(older, same)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        new, old = _read(store, ours, Path(folder)), _read(store, theirs, Path(folder))
        pairs, added, removed = _compare(new, old)
        shown_new = [p for p, _ in pairs[:SHOWN]] + added[:SHOWN]
        shown_old = [p for _, p in pairs[:SHOWN]] + removed[:SHOWN]
        places = _places(store, ours, new, shown_new, Path(folder))
        olds = _places(store, theirs, old, shown_old, Path(folder))
    return Diff(
        len(added),
        len(removed),
        len(pairs),
        max(rows[0] - len(added) - len(pairs), 0),
        [places[n] for n in added[:SHOWN]],
        [olds[n] for n in removed[:SHOWN]],
        [(places[a], olds[b]) for a, b in pairs[:SHOWN]],
        _files(newer, older),
    )


def _files(newer: Manifest, older: Manifest) -> list[tuple[str, str, str]]:
    new, old = {f.path: f.digest for f in newer.files}, {f.path: f.digest for f in older.files}
    return [(p, new.get(p, ""), old.get(p, "")) for p in sorted({*new, *old}) if new.get(p) != old.get(p)]


def _others(manifest: Manifest, same: Mapping[str, int]) -> list[File]:
    """The row files but for those that both sides have: rows in them are equal without being read."""
    left, found = dict(same), list[File]()
    for file in manifest.files if manifest.meta["rows"] else ():
        if left.get(file.digest, 0):
            left[file.digest] -= 1
        elif is_row_file(file.path):
            found.append(file)
    return found


def _rows(file: str, path: Path) -> Iterator[tuple[int, str]]:
    """(row number, the row as JSON with sorted keys) of what can be read as a row."""
    for raw in raw_rows(file, path):
        if not isinstance(raw, Problem):
            # Columns hold times, bytes and decimals too; their text tells them apart.
            yield raw[0], json.dumps(raw[1], sort_keys=True, ensure_ascii=False, default=str)


def _read(store: Store, files: Sequence[File], folder: Path) -> _Side:
    side, count = _Side(), 0
    for file, path in local(store, files, folder):
        for number, text in _rows(file, path):
            side.hashes += blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            side.numbers += number.to_bytes(8, "little")
            count += 1
        side.files.append(file)
        side.ends.append(count)
    return side


def _compare(new: _Side, old: _Side) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """(changed pairs, added, removed) as indices of rows. Equal rows meet first, as many as both sides have; what is left
    between the same two neighbours on both sides is one row that changed."""
    import numpy as np

    ours, theirs = (np.frombuffer(bytes(side.hashes), dtype="<u8") for side in (new, old))
    nth_new, nth_old = _nth(ours), _nth(theirs)
    left_new = np.flatnonzero(nth_new >= _count_in(ours, theirs))
    left_old = np.flatnonzero(nth_old >= _count_in(theirs, ours))
    waiting: dict[tuple[Any, ...], list[int]] = {}
    for index, gap in zip(left_old.tolist(), _gaps(old, theirs, nth_old, left_old), strict=True):
        waiting.setdefault(gap, []).append(index)
    for queue in waiting.values():
        queue.reverse()
    pairs, added = [], []
    for index, gap in zip(left_new.tolist(), _gaps(new, ours, nth_new, left_new), strict=True):
        if queue := waiting.get(gap, []):
            pairs.append((index, queue.pop()))
        else:
            added.append(index)
    return pairs, added, sorted(index for queue in waiting.values() for index in queue)


def _nth(hashes: Numbers) -> Numbers:
    """For each row, how many equal ones come before it."""
    import numpy as np

    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.zeros(0, int)
    nth = np.empty(len(hashes), np.int64)
    nth[order] = np.arange(len(hashes)) - np.repeat(starts, np.diff(np.r_[starts, len(hashes)]))
    return nth


def _count_in(hashes: Numbers, others: Numbers) -> Numbers:
    """For each row, how many equal ones the other side has."""
    import numpy as np

    ordered = np.sort(others)
    return np.searchsorted(ordered, hashes, "right") - np.searchsorted(ordered, hashes, "left")


def _gaps(side: _Side, hashes: Numbers, nth: Numbers, left: Numbers) -> Iterator[tuple[Any, ...]]:
    """For each unmatched row what stands before it: the nearest matched row of its file, or the file's beginning."""
    import numpy as np

    unmatched = np.zeros(len(hashes), bool)
    unmatched[left] = True
    before = np.maximum.accumulate(np.where(unmatched, -1, np.arange(len(hashes))))
    for index in left.tolist():
        file, _ = side.place(index)
        at = int(before[index])
        inside = at >= (side.ends[file - 1] if file else 0)
        yield (int(hashes[at]), int(nth[at])) if inside else (side.files[file],)


def _places(store: Store, files: Sequence[File], side: _Side, rows: Sequence[int], folder: Path) -> dict[int, Place]:
    """Rows with their text: their files are read once more, for a text of every row would not fit the memory."""
    wanted: dict[int, dict[int, int]] = {}
    for index in rows:
        file, number = side.place(index)
        wanted.setdefault(file, {})[number] = index
    found = {}
    for n, numbers in wanted.items():
        last = max(numbers)
        for name, path in local(store, [files[n]], folder):
            for number, text in _rows(name, path):
                if number in numbers:
                    shown = text[:TEXT_CHARS].encode("utf-8", "replace").decode()
                    found[numbers[number]] = Place(name, number, shown)
                if number >= last:
                    break
    return found
