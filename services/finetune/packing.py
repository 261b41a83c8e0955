"""Samples to blocks of equal length, memory-mapped. No sample is cut unless it is longer than a block.

Letters in shapes: N blocks, L tokens a block.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from services.finetune.templates import Encoded

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int32]
else:
    Ints = Any

IGNORED = -100
"""The label of a token that is not learned."""

_ARRAYS = ("ids", "labels", "positions", "segments")


@dataclass(frozen=True, slots=True)
class Blocks:
    """`labels` are ids, or IGNORED; `positions` restart at 0 for each sample; `segments` number the samples of a block
    from 1, 0 is padding. All are int32 [N, L]."""

    ids: Ints
    labels: Ints
    positions: Ints
    segments: Ints
    truncated: int
    """Samples that were cut at L tokens."""
    dropped: int
    """Samples with nothing to learn in their first L tokens."""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    def save(self, directory: Path) -> None:
        import numpy as np

        directory.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(directory / f"{name}.npy", getattr(self, name))
        np.save(directory / "counts.npy", np.array([self.truncated, self.dropped]))

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Map saved blocks into memory, read-only."""
        import numpy as np

        arrays = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in _ARRAYS}
        truncated, dropped = np.load(directory / "counts.npy").tolist()
        return cls(**arrays, truncated=truncated, dropped=dropped)


def pack(samples: Sequence[Encoded], max_length: int, packed: bool) -> Blocks:
    """Lay samples into blocks of `max_length` tokens: best fit, longest first, if `packed`; else one a block.

    Without packing, blocks are only as long as the longest sample. The layout depends on nothing but the samples.
    """
    import numpy as np

    # The first token of a sample is predicted by nothing of its own, so it is never learned.
    cut = [(s.ids[:max_length], s.mask[:max_length]) for s in samples]
    kept = [(ids, mask) for ids, mask in cut if any(mask[1:])]
    length = max_length if packed else max((len(ids) for ids, _ in kept), default=1)
    layout = _best_fit([len(ids) for ids, _ in kept], length) if packed else [[n] for n in range(len(kept))]
    arrays = {name: np.zeros((len(layout), length), np.int32) for name in _ARRAYS}
    arrays["labels"][:] = IGNORED
    for block, members in enumerate(layout):
        at = 0
        for segment, n in enumerate(members, 1):
            ids, mask = np.array(kept[n][0], np.int32), np.array(kept[n][1], bool)
            to = slice(at, at + len(ids))
            mask[0] = False
            arrays["ids"][block, to] = ids
            arrays["labels"][block, to] = np.where(mask, ids, IGNORED)
            arrays["positions"][block, to] = np.arange(len(ids))
            arrays["segments"][block, to] = segment
            at += len(ids)
    truncated = sum(len(s.ids) > max_length for s in samples)
    return Blocks(**arrays, truncated=truncated, dropped=len(samples) - len(kept))


def order(n: int, epoch: int, seed: int) -> NDArray[np.int64]:
    """The order of `n` blocks in an epoch: a permutation that depends on these three numbers only."""
    import numpy as np

    return np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64))).permutation(n)


def _best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Best-fit decreasing: each sample goes where it leaves the least room; ties to the oldest block."""
    blocks: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, block), sorted
    for n in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[n], -1))
        if at == len(free):
            blocks.append([])
            left, block = room, len(blocks) - 1
        else:
            left, block = free.pop(at)
        blocks[block].append(n)
        bisect.insort(free, (left - lengths[n], block))
    return blocks
