"""Frozen weights dealt out over the ranks: each keeps an equal part of every decoder layer, and a layer is put together
while the one before it computes. It is stage 3 of ZeRO (Rajbhandari et al. 2020) for weights that have no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from services.finetune.errors import ResourceExhausted, out_of_memory
from services.finetune.train.adapters import Uncovered
from services.finetune.train.parallel import Group

ALIGN = 128
"""Bytes that every tensor of a layer begins at a multiple of. Weights of real models are multiples, so they lie side by
side, as the fused path stacks them."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""By its name since torch 2.13, or its older one."""


class Dealt:
    """The linear layers of a decoder's layers, in two places in turn: those of even number in one, of odd in the other.

    So a layer's weights are always views of the same bytes, and whoever reads them, the model's own forward too, sees them
    as ever, once the layer is entered. Norms and biases stay whole; so do adapters, whose gradients are summed.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        self.group = group
        self.device = device
        self.parts: list[Tensor] = []
        """This rank's bytes of each layer."""
        self.places = torch.empty(2, 0, dtype=torch.uint8, device=device)
        self._held = [-1, -1]
        """The layer in each place, or on its way there."""
        self._ready: list[Any] = [None, None]
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None

    def add(self, layer: nn.Module) -> None:
        """Keep this rank's part of the next layer's linear weights, dense or NF4. Uncovered."""
        owners = [owner for m in layer.modules() if isinstance(m, nn.Linear) for owner in _owners(m)]
        tensors: list[Tensor] = [getattr(*owner) for owner in owners]
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + -(-tensor.nbytes // ALIGN) * ALIGN)
        size = -(-ends[-1] // (ALIGN * self.group.world)) * ALIGN
        if not self.parts:
            self.places = torch.empty(2, size * self.group.world, dtype=torch.uint8, device=self.device)
        elif size != len(self.parts[0]):
            raise Uncovered("layers of different sizes")
        number = len(self.parts)
        part = torch.zeros(size, dtype=torch.uint8, device=self.device)
        for owner, tensor, begin in zip(owners, tensors, ends, strict=False):
            values, own = tensor.reshape(-1).view(torch.uint8), begin - self.group.rank * size
            low, high = max(own, 0), min(own + tensor.nbytes, size)
            if low < high:
                part[low:high].copy_(values[low - own : high - own])
            whole = self.places[number % 2][begin : begin + tensor.nbytes]
            setattr(*owner, whole.view(tensor.dtype).view(tensor.shape))
        self.parts.append(part)
        layer.register_forward_pre_hook(lambda *_: self.enter(number, number + 1))

    def owns(self, weight: Tensor) -> bool:
        """Whether a tensor lies where layers are put together."""
        return weight.untyped_storage().data_ptr() == self.places.untyped_storage().data_ptr()

    def enter(self, number: int, then: int) -> None:
        """What is asked for from now on finds a layer's weights whole; those of layer `then`, a neighbour, begin to come if
        there is one. All ranks enter the same layers in the same order. Nothing waits for the device."""
        self._gather(number)
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._ready[number % 2])
        if 0 <= then < len(self.parts):
            self._gather(then)

    def _gather(self, number: int) -> None:
        place = number % 2
        if self._held[place] == number:
            return
        self._held[place] = number
        try:
            self._put_together(number, place)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            # Nobody knows how far it came on other ranks, so there is no going along.
            raise ResourceExhausted(
                "memory ran out while a layer was put together; lower schedule.batch_size (and raise schedule.accumulate), "
                "lower data.max_length, or train in more processes",
                reason="OUT_OF_MEMORY",
            ) from error

    def _put_together(self, number: int, place: int) -> None:
        if self._stream is None:
            _all_gather(self.places[place], self.parts[number])
            return
        # All that reads the layer before in this place was asked for already.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            _all_gather(self.places[place], self.parts[number])
            self._ready[place] = self._stream.record_event()


def _owners(linear: Any) -> list[tuple[Any, str]]:
    """What of a linear layer travels: (object, the name of its attribute)."""
    state = getattr(linear.weight, "quant_state", None)
    states = [] if state is None else [state, *([state.state2] if state.nested else [])]
    return [(linear.weight, "data"), *((one, "absmax") for one in states)]
