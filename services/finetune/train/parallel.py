"""The processes that train together: what each of them reads, and how what they found out is put together."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from services.finetune.progress import Attempt
from services.finetune.train.ranks import LINE, Place, place

T = TypeVar("T")
Batch = np.ndarray[Any, Any]
"""Numbers of blocks."""

BUCKET = 2**25
"""Elements of a gradient that travel together."""
LED = datetime.timedelta(days=7)
"""The wait for another rank where a leader watches, which knows better what takes long."""
UNLED = datetime.timedelta(minutes=30)
"""The same where nobody does: it covers the longest thing that rank 0 does alone."""


class Group:
    """This process among those of its run; alone, nothing is sent and nothing waited for."""

    def __init__(self, own: Place, beat: Callable[[bool], None] = lambda limited: None) -> None:
        self.rank, self.world = own.rank, own.world
        self.local_rank, self.local_world = own.local_rank, own.local_world
        self.beat = beat

    @property
    def device(self) -> torch.device:
        """What this rank computes on."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def speaks(self) -> bool:
        """Whether this is the rank that saves and tells."""
        return self.rank == 0

    def once(self, do: Callable[[], object]) -> None:
        """Let one rank of each machine do something; all go on when it is done everywhere."""
        self.beat(False)
        if self.local_rank == 0:
            do()
        if self.world > 1:
            dist.barrier()

    def from_first(self, do: Callable[[], T]) -> T:
        """What `do` gives on rank 0, where alone it is called."""
        if self.world == 1:
            return do()
        self.beat(False)
        found = [do() if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        return found[0]  # type: ignore[return-value]  # rank 0's

    def shared_folder(self, own: Path) -> Path:
        """A folder that the ranks of a machine have in common: that of its first rank."""
        if self.world == 1:
            return own
        folders: list[Any] = [None] * self.world
        dist.all_gather_object(folders, str(own))
        return Path(folders[self.rank - self.local_rank])

    def deal(self, blocks: Batch, size: int) -> list[Batch]:
        """This rank's share of a step's blocks, at most `size` at a time. Every rank gets as many batches, the last ones
        perhaps empty: in a collective step none may be missing."""
        mine = blocks[self.rank :: self.world]
        batches = math.ceil(math.ceil(len(blocks) / self.world) / size)
        return [mine[n * size : (n + 1) * size] for n in range(batches)]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum gradients over all ranks, in place; a rank that had no blocks, or no image, has none of its own. A weight that
        nobody has one of gets zeros, so that the optimizer does the same however many ranks there are."""
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        for bucket in _buckets(grads):
            whole = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(whole)
            for grad, part in zip(bucket, whole.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(part.view_as(grad))


ALONE = Group(Place())


@contextlib.contextmanager
def join(attempt: Attempt) -> Iterator[Group]:
    """The group of this process, once all of its ranks are there; left at the end."""
    own = place(os.environ) or Place()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(own.local_rank)
    group = Group(own, attempt.beat)
    if own.world > 1:
        group.beat(False)
        # Objects and small host tensors go by gloo also where gradients go by NCCL.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=LED if LINE in os.environ else UNLED)
    yield group
    if dist.is_initialized():
        dist.destroy_process_group()


def _buckets(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients of one type, few at a time: a copy of all would be as large as the model."""
    buckets: list[list[Tensor]] = []
    size = BUCKET
    for grad in sorted(grads, key=lambda g: str(g.dtype)):
        if size + grad.numel() > BUCKET or buckets[-1][0].dtype != grad.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(grad)
        size += grad.numel()
    return buckets
