"""Blocks to one flat run of tokens: padding dropped, document boundaries found once, one copy to the device.

Letters in shapes: T tokens, S documents, K learned tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.finetune.packing import Blocks
from services.finetune.train.ops_torch import Extent

ROUND = 256
"""T is a multiple of this, so that the allocator sees few sizes; the rest is one document of padding."""


@dataclass(frozen=True, slots=True)
class Flat:
    """Tokens of some blocks, all on the device, int32. `where_K` are the tokens that predict `wanted_K`, `images_M` (int64)
    those of images, where the model sees any."""

    ids_T: Tensor
    positions_T: Tensor
    where_K: Tensor
    wanted_K: Tensor
    extent: Extent
    images_M: Tensor | None = None


def flatten(blocks: Blocks, batch: np.ndarray[Any, Any], device: torch.device) -> Flat:
    """The blocks numbered in `batch`, without their padding."""
    kept = blocks.segments[batch] > 0
    ids, labels, positions = (a[batch][kept] for a in (blocks.ids, blocks.labels, blocks.positions))
    tokens = len(ids)
    rest = -tokens % ROUND
    starts = np.append(np.flatnonzero(positions == 0), [tokens, tokens + rest] if rest else [tokens])
    # A document's first token is never learned, so the one before a learned token is of the same document.
    learned = np.flatnonzero(labels >= 0)
    padding = np.zeros(rest, np.int32)
    pieces = [np.append(ids, padding), np.append(positions, padding), learned - 1, labels[learned], starts]
    whole = torch.from_numpy(np.concatenate(pieces).astype(np.int32))
    if device.type == "cuda":
        # Only from pinned memory does a copy not wait for the GPU.
        whole = whole.pin_memory().to(device, non_blocking=True)
    ids_T, positions_T, where_K, wanted_K, starts_S = whole.split([len(p) for p in pieces])
    return Flat(ids_T, positions_T, where_K, wanted_K, Extent(starts_S, int(np.diff(starts).max())))
