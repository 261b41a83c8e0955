"""Where the fused path finds a model's linear layers and keeps their LoRA weights: one flat master, gradient and copy.

Letters in shapes: I inputs, O outputs of a group, N adapted projections of a group, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Uncovered(Exception):
    """The fused path has no code for something in this model; the message says what."""


@dataclass(slots=True)
class Projection:
    """One linear layer: its frozen base, the rows of the group's output that are its own, its LoRA weights."""

    base: Any
    rows: slice
    a: Any = None
    b: Any = None
    b_copy: Tensor = field(default_factory=lambda: torch.empty(0))
    b_grad: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(slots=True)
class Group:
    """Linear layers that read the same input, done as one: stacked weights, stacked `a` [N R, I]."""

    projections: list[Projection]
    scale: float
    p: float
    weight: Tensor | None
    """Stacked [O, I]; None where the base is quantised, and made anew at each use."""
    bias: Tensor | None
    shape: tuple[int, int]
    a_copy: Tensor = field(default_factory=lambda: torch.empty(0))
    a_grad: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def adapted(self) -> list[Projection]:
        return [p for p in self.projections if p.a is not None]

    def dense(self, ops: Any, dtype: torch.dtype) -> Tensor:
        """The frozen weights [O, I]."""
        if self.weight is not None:
            return self.weight
        out = torch.empty(self.shape, dtype=dtype, device=self.projections[0].base.weight.device)
        for projection in self.projections:
            ops.dequantise(projection.base.weight, out[projection.rows])
        return out


def make_group(modules: Sequence[Any]) -> Group:
    """Group modules of one input. Uncovered."""
    adapters = {_settings(m) for m in modules} - {None}
    if len(adapters) > 1:
        raise Uncovered("projections of one input with different LoRA settings")
    bases = [_base(m) for m in modules]
    projections, at = [], 0
    for module, base in zip(modules, bases, strict=True):
        made = Projection(base, slice(at, at + base.out_features))
        if module is not base:
            made.a, made.b = module.lora_A["default"].weight, module.lora_B["default"].weight
        projections.append(made)
        at += base.out_features
    _, scale, p = next(iter(adapters), (0, 0.0, 0.0)) or (0, 0.0, 0.0)
    shape = (at, bases[0].in_features)
    return Group(projections, scale, p, _stack(bases, shape), _bias(bases), shape)


def _settings(module: Any) -> tuple[int, float, float] | None:
    if not hasattr(module, "lora_A"):
        return None
    plain = list(module.lora_A) == ["default"] and not module.merged_adapters
    if not plain or any(module.use_dora.values()) or any(module.lora_bias.values()):
        raise Uncovered("an adapter that is not plain LoRA")
    drop = module.lora_dropout["default"]
    return module.r["default"], float(module.scaling["default"]), float(getattr(drop, "p", 0.0))


def _base(module: Any) -> Any:
    base = module.base_layer if hasattr(module, "lora_A") else module
    name = type(base).__name__
    if type(base) is not torch.nn.Linear and name != "Linear4bit":
        raise Uncovered(f"a linear layer of class {name}")
    if name == "Linear4bit" and base.weight.quant_state.quant_type != "nf4":
        raise Uncovered(f"{base.weight.quant_state.quant_type} weights")
    return base


def _stack(bases: Sequence[Any], shape: tuple[int, int]) -> Tensor | None:
    """Stacked weights; the modules' own become views of them, so nothing is held twice."""
    quantised = {type(b).__name__ == "Linear4bit" for b in bases}
    if len(quantised) > 1:
        raise Uncovered("projections of one input of which some are quantised")
    if quantised == {True}:
        return None
    weights: list[Tensor] = [base.weight.data for base in bases]
    if _side_by_side(weights):
        return weights[0].as_strided(shape, (shape[1], 1))
    stacked = torch.empty(shape, dtype=bases[0].weight.dtype, device=bases[0].weight.device)
    at = 0
    for base in bases:
        rows = stacked[at : at + base.out_features]
        rows.copy_(base.weight.data)
        base.weight.data = rows
        at += base.out_features
    return stacked


def _side_by_side(weights: Sequence[Tensor]) -> bool:
    """Whether matrices lie in one storage without holes between them, as those of one layer do that were stacked before."""
    first = weights[0]
    starts = itertools.accumulate((w.nbytes for w in weights), initial=first.data_ptr())
    one = {w.untyped_storage().data_ptr() for w in weights} == {first.untyped_storage().data_ptr()}
    return one and all(w.is_contiguous() and w.data_ptr() == at for w, at in zip(weights, starts, strict=False))


def _bias(bases: Sequence[Any]) -> Tensor | None:
    if all(b.bias is None for b in bases):
        return None
    parts = [b.weight.new_zeros(b.out_features) if b.bias is None else b.bias.data for b in bases]
    return torch.cat(parts)


class Adapters:
    """All LoRA weights as views of one float32 tensor, with a gradient and a copy in the computing dtype of equal layout.

    So the gradient is zeroed, the copy renewed, each by one kernel. The model's parameters keep their identity.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype, device: torch.device) -> None:
        parameters = [p for g in groups for p in _in_order(g)]
        size = sum(p.numel() for p in parameters)
        self.master = torch.empty(size, dtype=torch.float32, device=device)
        self.grad = torch.zeros_like(self.master)
        self.copy = torch.empty(size, dtype=dtype, device=self.master.device)
        self._views: list[tuple[Any, Tensor]] = []
        at = 0
        for parameter in parameters:
            part = slice(at, at + parameter.numel())
            self.master[part].view(parameter.shape).copy_(parameter.data)
            parameter.data = self.master[part].view(parameter.shape)
            self._views.append((parameter, self.grad[part].view(parameter.shape)))
            at = part.stop
        at = 0
        for group in groups:
            at = self._hand_out(group, at)
        self.begin()

    def _hand_out(self, group: Group, at: int) -> int:
        adapted = group.adapted
        if adapted:
            shape = (len(adapted) * adapted[0].a.shape[0], group.shape[1])
            part = slice(at, at + shape[0] * shape[1])
            group.a_copy, group.a_grad = self.copy[part].view(shape), self.grad[part].view(shape)
            at = part.stop
        for projection in adapted:
            part = slice(at, at + projection.b.numel())
            projection.b_copy = self.copy[part].view(projection.b.shape)
            projection.b_grad = self.grad[part].view(projection.b.shape)
            at = part.stop
        return at

    def begin(self) -> None:
        """Before a step: gradients zero and in place, copies fresh."""
        self.copy.copy_(self.master)
        self.grad.zero_()
        for parameter, grad in self._views:
            parameter.grad = grad


def _in_order(group: Group) -> Iterator[Any]:
    yield from (p.a for p in group.adapted)
    yield from (p.b for p in group.adapted)
