"""The fused path's operations in plain torch: their meaning, and what they run as without Triton.

Letters in shapes: T tokens, D hidden, F inner size of the MLP, I and O inputs and outputs of a linear layer, N projections
that share an input, R rank, H heads, K learned tokens, V vocabulary. In-place: the first argument is overwritten.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Source(NamedTuple):
    """What a linear layer's input is made from again in the backward pass: x itself ("plain"), a hidden state with its
    1/rms and the norm's weight ("normed"), or gate and up side by side ("gated")."""

    kind: str
    of: Tensor
    rstd: Tensor | None = None
    weight: Tensor | None = None


class Drop(NamedTuple):
    """Dropout of one layer's projections: each has a mask of its own, which follows from `seed` (below 2^31)."""

    p: float
    seed: int

    @property
    def threshold(self) -> int:
        return round(self.p * 2**32)


class Heads(NamedTuple):
    """How qkv [T, (queries + 2 keys) * size] is divided; the weights of the norms of q and k where a model has them."""

    queries: int
    keys: int
    size: int
    eps: float = 0.0
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None


class Turns(NamedTuple):
    """Rotary tables [positions, size / 2], float32, and the tokens' positions [T]."""

    cos: Tensor
    sin: Tensor
    positions: Tensor


class Extent(NamedTuple):
    """Where documents begin in T tokens (int32, the end included), and the longest one's length."""

    starts: Tensor
    longest: int


def keep(x: Tensor, drop: Drop, n: int) -> Tensor:
    """bool like `x` [T, I]: what survives the dropout of projection `n`."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape) & 0xFFFFFFFF
    seed = _mix(torch.tensor((drop.seed + n * 0x9E3779B9) & 0xFFFFFFFF, device=x.device))
    return _mix((index * 0x9E3779B1 + seed) & 0xFFFFFFFF, last=False) >= drop.threshold


def _mix(x: Tensor, last: bool = True) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16) if last else x


def add_norm(h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(h + delta, its RMS norm times weight, 1/rms [T])."""
    h = h if delta is None else h + delta
    rstd = torch.rsqrt(h.float().square().mean(-1) + eps)
    return h, (h.float() * rstd[:, None] * weight.float()).to(h.dtype), rstd


def norm_back(grad: Tensor, dx: Tensor, h: Tensor, rstd: Tensor, weight: Tensor) -> None:
    """In place: `grad` of the hidden state gets the norm's share, for `dx` behind the norm."""
    unit, inner = h.float() * rstd[:, None], dx.float() * weight.float()
    grad += (rstd[:, None] * (inner - unit * (inner * unit).mean(-1, keepdim=True))).to(grad.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, 1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def swiglu_back(gate_up: Tensor, dact: Tensor) -> None:
    """In place: gate and up become their gradients."""
    gate, up = gate_up.float().chunk(2, 1)
    s, d = torch.sigmoid(gate), dact.float()
    gate_up.copy_(torch.cat((d * up * s * (1 + gate * (1 - s)), d * gate * s), 1))


def rope(qkv: Tensor, turns: Turns, heads: Heads) -> Tensor:
    """Norm (where the model does) and turn queries and keys; in place unless there is a norm."""
    q, k, v = _parts(qkv, heads)
    if heads.q_weight is not None and heads.k_weight is not None:
        q, k = _head_norm(q, heads.q_weight, heads.eps), _head_norm(k, heads.k_weight, heads.eps)
        return torch.cat([t.flatten(1) for t in (_turn(q, turns), _turn(k, turns), v)], 1)
    q.copy_(_turn(q, turns))
    k.copy_(_turn(k, turns))
    return qkv


def rope_back(dq: Tensor, dk: Tensor, dv: Tensor, raw: Tensor | None, turns: Turns, heads: Heads) -> Tensor:
    """The gradient of qkv, from those of turned queries and keys; `raw` is qkv before the norm, where there is one."""
    back = turns._replace(sin=-turns.sin)
    dq, dk = _turn(dq, back), _turn(dk, back)
    if raw is not None:
        q, k, _ = _parts(raw, heads)
        with torch.enable_grad():
            q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
            assert heads.q_weight is not None and heads.k_weight is not None
            outs = (_head_norm(q, heads.q_weight, heads.eps), _head_norm(k, heads.k_weight, heads.eps))
            dq, dk = torch.autograd.grad(outs, (q, k), (dq, dk))
    return torch.cat([t.flatten(1) for t in (dq, dk, dv)], 1)


def _parts(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    parts = qkv.view(qkv.shape[0], -1, heads.size).split([heads.queries, heads.keys, heads.keys], 1)
    return parts[0], parts[1], parts[2]


def _head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _turn(x: Tensor, turns: Turns) -> Tensor:
    cos, sin = (t[turns.positions.long()][:, None] for t in (turns.cos, turns.sin))
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def attend(qkv: Tensor, heads: Heads, extent: Extent, scale: float, window: int) -> tuple[Tensor, Any]:
    """(out [T, queries * size], what attend_back needs): causal attention inside each document, over the last `window`
    tokens if not 0."""
    outs = []
    for a, b in _spans(extent):
        q, k, v = (t[a:b].transpose(0, 1) for t in _parts(qkv, heads))
        seen = _near(b - a, window, q)
        out = functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs).flatten(1), None


def attend_back(
    dout: Tensor, out: Tensor, kept: Any, qkv: Tensor, heads: Heads, extent: Extent, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, each [T, H, size]."""
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(attend(leaf, heads, extent, scale, window)[0], leaf, dout)
    return _parts(grad, heads)


def _near(length: int, window: int, like: Tensor) -> Tensor:
    seen = torch.ones(length, length, dtype=torch.bool, device=like.device).tril()
    return seen.triu(1 - window) if window else seen


def _spans(extent: Extent) -> list[tuple[int, int]]:
    starts = extent.starts.tolist()
    return list(itertools.pairwise(starts))


def lora_down(x: Tensor, a: Tensor, n: int, scale: float, drop: Drop) -> Tensor:
    """[T, N R] = scale * dropout_n(x) @ a_n^T, `a` being [N R, I]."""
    if not drop.p:
        return (x @ a.t()) * scale
    factor = scale / (1 - drop.p)
    return torch.cat([(x * keep(x, drop, i)) @ part.t() * factor for i, part in enumerate(a.chunk(n))], 1)


def lora_grad_a(grad: Tensor, g: Tensor, source: Source, n: int, scale: float, drop: Drop) -> None:
    """In place: grad [N R, I], float32, += scale * g_n^T @ dropout_n(x)."""
    x = remake(source)
    for i, (part, g_n) in enumerate(zip(grad.chunk(n), g.chunk(n, 1), strict=True)):
        dropped = x * keep(x, drop, i) / (1 - drop.p) if drop.p else x
        part += (g_n.t() @ dropped).float() * scale


def remake(source: Source) -> Tensor:
    """The input of a linear layer."""
    if source.kind == "gated":
        return swiglu(source.of)
    if source.kind == "normed":
        assert source.rstd is not None and source.weight is not None
        return (source.of.float() * source.rstd[:, None] * source.weight.float()).to(source.of.dtype)
    return source.of


def lora_grad_x(
    dx: Tensor, g: Tensor, a: Tensor, n: int, scale: float, drop: Drop, gate_up: Tensor | None = None
) -> None:
    """In place: dx [T, I] += scale * sum over n of dropout_n(g_n @ a_n). With `gate_up`, which x came from by swiglu, that
    becomes its gradient instead."""
    for i, (g_n, part) in enumerate(zip(g.chunk(n, 1), a.chunk(n), strict=True)):
        share = g_n @ part
        dx += (share * keep(dx, drop, i) / (1 - drop.p) if drop.p else share) * scale
    if gate_up is not None:
        swiglu_back(gate_up, dx)


def cross_entropy(logits: Tensor, wanted: Tensor, scale: float) -> Tensor:
    """Losses [K]; in place: logits [K, V] become their gradient times `scale`."""
    logs = torch.log_softmax(logits.float(), 1)
    rows = torch.arange(len(wanted), device=logits.device)
    losses = -logs[rows, wanted.long()]
    grad = logs.exp()
    grad[rows, wanted.long()] -= 1
    logits.copy_(grad * scale)
    return losses


def dequantise(weight: Any, out: Tensor) -> None:
    """Fill `out` [O, I] with the values of a 4 bit weight of bitsandbytes."""
    from bitsandbytes.functional import dequantize_4bit

    out.copy_(dequantize_4bit(weight.data, weight.quant_state))


def weight_grad(grad: Tensor, dy: Tensor, xa: Tensor) -> None:
    """In place: grad [O, R], float32, += dy^T @ xa."""
    grad += (dy.t() @ xa).float()
