"""The fused path's operations on a GPU: Triton kernels, torch's flash attention. ops_torch.py says what each means."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from services.finetune.train import kernels
from services.finetune.train.ops_torch import Drop, Extent, Heads, Source, Turns, _parts

DOWN = {"BT": 64, "BI": 128, "num_warps": 4, "num_stages": 3}
GRAD_A = {
    "plain": {"BT": 64, "BI": 128, "num_warps": 8, "num_stages": 3},
    "normed": {"BT": 64, "BI": 128, "num_warps": 4, "num_stages": 3},
    "gated": {"BT": 32, "BI": 64, "num_warps": 4, "num_stages": 3},
}
GRAD_X = {
    "plain": {"BT": 64, "BI": 64, "num_warps": 4, "num_stages": 2},
    "gated": {"BT": 16, "BI": 128, "num_warps": 4, "num_stages": 2},
}
"""Tiles, the best of those tried on an H100 at hidden 4096, inner 11008, rank 64."""
WIDE = 128
"""Of a higher rank a tile does not fit a program's shared memory: dropout is a pass of its own beside a plain product."""
PASS = {"BT": 16, "BI": 256, "num_warps": 4}

_KINDS = {"plain": 0, "normed": 1, "gated": 2}


def add_norm(h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    tokens, size = h.shape
    out = h if delta is None else torch.empty_like(h)
    x, rstd = torch.empty_like(h), h.new_empty(tokens, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    kernels.add_norm[(tokens,)](
        h, delta, weight, out, x, rstd, eps, D=size, ADD=delta is not None, BD=block, num_warps=_warps(block)
    )
    return out, x, rstd


def norm_back(grad: Tensor, dx: Tensor, h: Tensor, rstd: Tensor, weight: Tensor) -> None:
    tokens, size = h.shape
    block = triton.next_power_of_2(size)
    kernels.norm_back[(tokens,)](grad, dx, h, rstd, weight, D=size, BD=block, num_warps=_warps(block))


def swiglu(gate_up: Tensor) -> Tensor:
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    act = gate_up.new_empty(tokens, inner)
    kernels.swiglu[(triton.cdiv(inner, 2048), tokens)](gate_up, act, inner, BF=2048, num_warps=8)
    return act


def swiglu_back(gate_up: Tensor, dact: Tensor) -> None:
    tokens, inner = dact.shape
    kernels.swiglu_back[(triton.cdiv(inner, 2048), tokens)](dact, gate_up, inner, BF=2048, num_warps=8)


def rope(qkv: Tensor, turns: Turns, heads: Heads) -> Tensor:
    out = qkv
    if heads.q_weight is not None:
        out = torch.empty_like(qkv)
        out[:, (heads.queries + heads.keys) * heads.size :] = qkv[:, (heads.queries + heads.keys) * heads.size :]
    kernels.rope[(qkv.shape[0],)](
        qkv, out, *turns, heads.q_weight, heads.k_weight, qkv.shape[1], heads.eps,
        **_heads(heads, heads.queries + heads.keys),
    )  # fmt: skip
    return out


def rope_back(dq: Tensor, dk: Tensor, dv: Tensor, raw: Tensor | None, turns: Turns, heads: Heads) -> Tensor:
    tokens, width = dq.shape[0], (heads.queries + 2 * heads.keys) * heads.size
    dqkv = dq.new_empty(tokens, width)
    kernels.rope_back[(tokens,)](
        dq.contiguous(), dk.contiguous(), dv.contiguous(), dqkv, raw, *turns, heads.q_weight, heads.k_weight, width,
        heads.eps, **_heads(heads, heads.queries + 2 * heads.keys),
    )  # fmt: skip
    return dqkv


def _heads(heads: Heads, rows: int) -> dict[str, Any]:
    half = heads.size // 2
    sizes = {"Q": heads.queries, "K": heads.keys, "HALF": half, "NORM": heads.q_weight is not None}
    return {**sizes, "BH": triton.next_power_of_2(rows), "BC": triton.next_power_of_2(half), "num_warps": 8}


def attend(qkv: Tensor, heads: Heads, extent: Extent, scale: float, window: int) -> tuple[Tensor, Any]:
    q, k, v = _parts(qkv, heads)
    starts, longest = extent
    # What torch.nn.attention.varlen.varlen_attn calls; by hand, as forward and backward are two calls here.
    out, *kept = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale, **_window(window)
    )
    return out.flatten(1), kept[:3]


def attend_back(
    dout: Tensor, out: Tensor, kept: Any, qkv: Tensor, heads: Heads, extent: Extent, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _parts(qkv, heads)
    (lse, state, unused), (starts, longest) = kept, extent
    dout, out = (t.view(q.shape) for t in (dout, out))
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, lse, starts, starts, longest, longest, 0.0, True, state, unused, scale=scale,
        **_window(window),
    )  # fmt: skip
    return grads


def _window(window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def lora_down(x: Tensor, a: Tensor, n: int, scale: float, drop: Drop) -> Tensor:
    if not drop.p:
        return (x @ a.t()).mul_(scale)
    tokens, size = x.shape
    rank = a.shape[0] // n
    out = x.new_empty(tokens, n * rank)
    if rank > WIDE:
        for i, (part, to) in enumerate(zip(a.chunk(n), out.chunk(n, 1), strict=True)):
            torch.mm(_dropped(Source("plain", x), size, drop, i), part.t(), out=to)
        return out.mul_(scale / (1 - drop.p))
    kernels.lora_down[(n, triton.cdiv(tokens, DOWN["BT"]))](
        x, a, out, tokens, scale / (1 - drop.p), drop.seed, drop.threshold, N=n, R=rank, IN=size, BR=_rank(rank), **DOWN
    )
    return out


def lora_grad_a(grad: Tensor, g: Tensor, source: Source, n: int, scale: float, drop: Drop) -> None:
    tokens, size, rank = g.shape[0], grad.shape[1], grad.shape[0] // n
    if rank > WIDE:
        for i, (part, g_n) in enumerate(zip(grad.chunk(n), g.chunk(n, 1), strict=True)):
            made = torch.mm(g_n.t(), _dropped(source, size, drop, i), out_dtype=torch.float32)
            part.add_(made, alpha=scale / (1 - drop.p))
        return
    tiles = GRAD_A[source.kind]
    strips = triton.cdiv(size, tiles["BI"])
    # Enough programs to fill the GPU twice; each sums a part of the tokens, in a fixed order.
    parts = max(1, min(16, triton.cdiv(528, strips * n), tokens // 256))
    chunk = triton.cdiv(triton.cdiv(tokens, parts), tiles["BT"]) * tiles["BT"]
    out = grad.new_empty(parts, *grad.shape)
    kernels.lora_grad_a[(n, strips, parts)](
        g, source.of, source.rstd, source.weight, out, tokens, chunk, scale / (1 - drop.p), drop.seed, drop.threshold,
        N=n, R=rank, IN=size, KIND=_KINDS[source.kind], BR=_rank(rank), **tiles,
    )  # fmt: skip
    grad += out.sum(0) if parts > 1 else out[0]


def lora_grad_x(
    dx: Tensor, g: Tensor, a: Tensor, n: int, scale: float, drop: Drop, gate_up: Tensor | None = None
) -> None:
    tokens, size = dx.shape
    rank = a.shape[0] // n
    if rank > WIDE:
        for i, (part, g_n) in enumerate(zip(a.chunk(n), g.chunk(n, 1), strict=True)):
            kernels.add_dropped[_grid(tokens, size)](
                dx, g_n @ part, tokens, scale / (1 - drop.p), drop.seed, drop.threshold, i, IN=size, **PASS
            )
        if gate_up is not None:
            swiglu_back(gate_up, dx)
        return
    tiles = GRAD_X["plain" if gate_up is None else "gated"]
    kernels.lora_grad_x[(triton.cdiv(size, tiles["BI"]), triton.cdiv(tokens, tiles["BT"]))](
        dx, g, a, gate_up, tokens, scale / (1 - drop.p), drop.seed, drop.threshold,
        N=n, R=rank, IN=size, GATE=gate_up is not None, BR=_rank(rank), **tiles,
    )  # fmt: skip


def _dropped(source: Source, size: int, drop: Drop, n: int) -> Tensor:
    """The input of a linear layer where dropout n keeps it, not scaled up."""
    tokens = source.of.shape[0]
    out = source.of.new_empty(tokens, size)
    kernels.dropped[_grid(tokens, size)](
        source.of, source.rstd, source.weight, out, tokens, drop.seed, drop.threshold, n,
        IN=size, KIND=_KINDS[source.kind], **PASS,
    )  # fmt: skip
    return out


def _grid(tokens: int, size: int) -> tuple[int, int]:
    return triton.cdiv(size, PASS["BI"]), triton.cdiv(tokens, PASS["BT"])


def cross_entropy(logits: Tensor, wanted: Tensor, scale: float) -> Tensor:
    losses = logits.new_empty(len(wanted), dtype=torch.float32)
    if len(wanted):
        block = min(8192, triton.next_power_of_2(logits.shape[1]))
        kernels.cross_entropy[(len(wanted),)](
            logits, wanted, losses, logits.shape[1], scale, BV=block, num_warps=_warps(block)
        )
    return losses


def dequantise(weight: Any, out: Tensor) -> None:
    state = weight.quant_state
    nested = state.nested
    second = state.state2 if nested else None
    kernels.dequantise[(triton.cdiv(out.numel(), 2048),)](
        weight.data.view(torch.uint8), state.absmax, state.code, out, second and second.absmax, second and second.code,
        state.offset if nested else None, out.numel(), BLOCK=state.blocksize, BLOCK2=second.blocksize if second else 1,
        NESTED=nested, B=2048, num_warps=4,
    )  # fmt: skip


def weight_grad(grad: Tensor, dy: Tensor, xa: Tensor) -> None:
    grad += torch.mm(dy.t(), xa, out_dtype=torch.float32)


def _warps(block: int) -> int:
    return min(16, max(4, block // 512))


def _rank(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))
