"""Triton kernels of the fused path, one program's work each; ops_triton.py launches them, ops_torch.py says what they mean.

Letters: T tokens, D hidden, I inputs of a linear layer, R rank, V vocabulary. Tiles are B*. Sums are float32 throughout.
Dropout masks are never stored: each is a hash of (element, seed), the same in forward and backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

PLAIN, NORMED, GATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What lora_grad_a makes its input from: x itself, a hidden state and its norm, or gate and up."""


@triton.jit
def mix(x):
    """A 32 bit integer hash (lowbias32)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def keep(rows, cols, width, seed, threshold):
    """Which elements of a tile survive dropout. All of mix but its last shift, which high bits do not need: this hash,
    not memory, is what the LoRA kernels wait for."""
    x = (rows.to(tl.uint32) * width * 0x9E3779B1 + seed)[:, None] + (cols.to(tl.uint32) * 0x9E3779B1)[None, :]
    x = (x ^ (x >> 16)) * 0x7FEB352D
    return (x ^ (x >> 15)) * 0x846CA68B >= threshold


@triton.jit
def projection_seed(seed, projection):
    return mix(seed.to(tl.uint32) + projection.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def add_norm(h, delta, weight, h_out, x, rstd, eps, D: tl.constexpr, ADD: tl.constexpr, BD: tl.constexpr):
    """A row: h + delta, and its RMS norm."""
    row = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BD)
    inside = cols < D
    value = tl.load(h + row + cols, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(delta + row + cols, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(h_out.dtype.element_ty)
        tl.store(h_out + row + cols, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / D + eps)
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + row + cols, (value * scale * w).to(x.dtype.element_ty), mask=inside)
    tl.store(rstd + tl.program_id(0), scale)


@triton.jit
def norm_back(grad, dx, h, rstd, weight, D: tl.constexpr, BD: tl.constexpr):
    """A row: grad += the norm's gradient, for dx behind the norm."""
    row = tl.program_id(0).to(tl.int64) * D
    cols = tl.arange(0, BD)
    inside = cols < D
    scale = tl.load(rstd + tl.program_id(0))
    unit = tl.load(h + row + cols, mask=inside, other=0.0).to(tl.float32) * scale
    w = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    inner = tl.load(dx + row + cols, mask=inside, other=0.0).to(tl.float32) * w
    mean = tl.sum(inner * unit, axis=0) / D
    old = tl.load(grad + row + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + row + cols, (old + scale * (inner - unit * mean)).to(grad.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(gate_up, act, F, BF: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BF + tl.arange(0, BF)
    inside = cols < F
    gate = tl.load(gate_up + row * 2 * F + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(act + row * F + cols, (gate * tl.sigmoid(gate) * up).to(act.dtype.element_ty), mask=inside)


@triton.jit
def gated_back(grad, gate, up):
    s = tl.sigmoid(gate)
    return grad * up * s * (1.0 + gate * (1.0 - s)), grad * gate * s


@triton.jit
def swiglu_back(dact, gate_up, F, BF: tl.constexpr):
    """gate and up are overwritten by their gradients."""
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BF + tl.arange(0, BF)
    inside = cols < F
    at = gate_up + row * 2 * F + cols
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dact + row * F + cols, mask=inside, other=0.0).to(tl.float32)
    dgate, dup = gated_back(grad, gate, up)
    tl.store(at, dgate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(at + F, dup.to(gate_up.dtype.element_ty), mask=inside)


@triton.jit
def rope(
    qkv, out, cos, sin, positions, q_weight, k_weight, width, eps,
    Q: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A token: its query and key heads normed (NORM) and turned by its position."""
    token = tl.program_id(0).to(tl.int64)
    heads, cols = tl.arange(0, BH)[:, None], tl.arange(0, BC)[None, :]
    inside = (heads < Q + K) & (cols < HALF)
    at = token * width + heads * 2 * HALF + cols
    a = tl.load(qkv + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv + at + HALF, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        scale = 1.0 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * HALF) + eps)[:, None]
        is_q = heads < Q
        a *= scale * tl.where(is_q, tl.load(q_weight + cols), tl.load(k_weight + cols)).to(tl.float32)
        b *= scale * tl.where(is_q, tl.load(q_weight + HALF + cols), tl.load(k_weight + HALF + cols)).to(tl.float32)
    turn = tl.load(positions + token).to(tl.int64) * HALF + cols
    c = tl.load(cos + turn, mask=cols < HALF, other=0.0)
    s = tl.load(sin + turn, mask=cols < HALF, other=0.0)
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rope_back(
    dq, dk, dv, dqkv, raw, cos, sin, positions, q_weight, k_weight, width, eps,
    Q: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A token: the gradients of its heads, turned back and laid side by side as qkv is."""
    token = tl.program_id(0).to(tl.int64)
    heads, cols = tl.arange(0, BH)[:, None], tl.arange(0, BC)[None, :]
    half = cols < HALF
    is_q, is_k = (heads < Q) & half, (heads >= Q) & (heads < Q + K) & half
    is_v = (heads >= Q + K) & (heads < Q + 2 * K) & half
    q_at = dq + token * Q * 2 * HALF + heads * 2 * HALF + cols
    k_at = dk + token * K * 2 * HALF + (heads - Q) * 2 * HALF + cols
    v_at = dv + token * K * 2 * HALF + (heads - Q - K) * 2 * HALF + cols
    a = tl.load(q_at, mask=is_q, other=0.0).to(tl.float32) + tl.load(k_at, mask=is_k, other=0.0).to(tl.float32)
    b = tl.load(q_at + HALF, mask=is_q, other=0.0).to(tl.float32)
    b += tl.load(k_at + HALF, mask=is_k, other=0.0).to(tl.float32)
    turn = tl.load(positions + token).to(tl.int64) * HALF + cols
    c = tl.load(cos + turn, mask=half, other=0.0)
    s = tl.load(sin + turn, mask=half, other=0.0)
    da, db = a * c + b * s, b * c - a * s
    at = token * width + heads * 2 * HALF + cols
    turned = is_q | is_k
    if NORM:
        x = tl.load(raw + at, mask=turned, other=0.0).to(tl.float32)
        y = tl.load(raw + at + HALF, mask=turned, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt((tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)) / (2 * HALF) + eps)[:, None]
        x, y = x * scale, y * scale
        da *= tl.where(heads < Q, tl.load(q_weight + cols), tl.load(k_weight + cols)).to(tl.float32)
        db *= tl.where(heads < Q, tl.load(q_weight + HALF + cols), tl.load(k_weight + HALF + cols)).to(tl.float32)
        mean = ((tl.sum(da * x, axis=1) + tl.sum(db * y, axis=1)) / (2 * HALF))[:, None]
        da, db = scale * (da - x * mean), scale * (db - y * mean)
    kind = dqkv.dtype.element_ty
    da = tl.where(is_v, tl.load(v_at, mask=is_v, other=0.0).to(tl.float32), da)
    db = tl.where(is_v, tl.load(v_at + HALF, mask=is_v, other=0.0).to(tl.float32), db)
    tl.store(dqkv + at, da.to(kind), mask=turned | is_v)
    tl.store(dqkv + at + HALF, db.to(kind), mask=turned | is_v)


@triton.jit(do_not_specialize=["seed"])
def lora_down(
    x, a, out, tokens, scale, seed, threshold,
    N: tl.constexpr, R: tl.constexpr, IN: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out[T, N R] = scale * dropout_n(x[T, I]) @ a_n[R, I]^T, a mask of its own for each of N projections."""
    n = tl.program_id(0)
    rows, ranks = tl.program_id(1) * BT + tl.arange(0, BT), tl.arange(0, BR)
    seed_n = projection_seed(seed, n)
    total = tl.zeros((BT, BR), tl.float32)
    for start in range(0, IN, BI):
        cols = start + tl.arange(0, BI)
        inside = (rows[:, None] < tokens) & (cols[None, :] < IN)
        tile = tl.load(x + rows.to(tl.int64)[:, None] * IN + cols[None, :], mask=inside, other=0.0)
        tile = tl.where(keep(rows, cols, IN, seed_n, threshold), tile, 0.0).to(x.dtype.element_ty)
        here = (ranks[None, :] < R) & (cols[:, None] < IN)
        weights = tl.load(a + (n * R + ranks)[None, :] * IN + cols[:, None], mask=here, other=0.0)
        total = tl.dot(tile, weights, total)
    to = out + rows.to(tl.int64)[:, None] * (N * R) + n * R + ranks[None, :]
    tl.store(to, (total * scale).to(out.dtype.element_ty), mask=(rows[:, None] < tokens) & (ranks[None, :] < R))


@triton.jit
def remade(source, rstd, weight, rows, cols, end, IN: tl.constexpr, KIND: tl.constexpr):
    """A tile of a linear layer's input, made anew; rows from `end` on are 0."""
    inside = (rows[:, None] < end) & (cols[None, :] < IN)
    wide = rows.to(tl.int64)[:, None]
    if KIND == GATED:
        gate = tl.load(source + wide * 2 * IN + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(source + wide * 2 * IN + IN + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        tile = gate * tl.sigmoid(gate) * up
    else:
        tile = tl.load(source + wide * IN + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if KIND == NORMED:
        factor = tl.load(rstd + rows, mask=rows < end, other=0.0)[:, None]
        tile *= factor * tl.load(weight + cols, mask=cols < IN, other=0.0).to(tl.float32)[None, :]
    return tile


@triton.jit(do_not_specialize=["seed", "n"])
def dropped(
    source, rstd, weight, out, tokens, seed, threshold, n,
    IN: tl.constexpr, KIND: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out[T, I] = a linear layer's input, made anew, where dropout n keeps it, else 0."""
    cols, rows = tl.program_id(0) * BI + tl.arange(0, BI), tl.program_id(1) * BT + tl.arange(0, BT)
    tile = remade(source, rstd, weight, rows, cols, tokens, IN, KIND)
    tile = tl.where(keep(rows, cols, IN, projection_seed(seed, n), threshold), tile, 0.0)
    inside = (rows[:, None] < tokens) & (cols[None, :] < IN)
    tl.store(out + rows.to(tl.int64)[:, None] * IN + cols[None, :], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "n"])
def add_dropped(dx, share, tokens, scale, seed, threshold, n, IN: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr):
    """dx[T, I] += scale * share, where dropout n keeps it."""
    cols, rows = tl.program_id(0) * BI + tl.arange(0, BI), tl.program_id(1) * BT + tl.arange(0, BT)
    inside = (rows[:, None] < tokens) & (cols[None, :] < IN)
    at = rows.to(tl.int64)[:, None] * IN + cols[None, :]
    tile = tl.load(share + at, mask=inside, other=0.0).to(tl.float32)
    tile = tl.where(keep(rows, cols, IN, projection_seed(seed, n), threshold), tile, 0.0)
    total = tl.load(dx + at, mask=inside, other=0.0).to(tl.float32) + tile * scale
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def lora_grad_a(
    g, source, rstd, weight, out, tokens, chunk, scale, seed, threshold,
    N: tl.constexpr, R: tl.constexpr, IN: tl.constexpr, KIND: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out[chunk, N R, I] = scale * g_n[chunk, R]^T @ dropout_n(x), x made anew from `source` (KIND)."""
    n, part = tl.program_id(0), tl.program_id(2)
    cols, ranks = tl.program_id(1) * BI + tl.arange(0, BI), tl.arange(0, BR)
    seed_n = projection_seed(seed, n)
    end = tl.minimum(tokens, (part + 1) * chunk)
    total = tl.zeros((BR, BI), tl.float32)
    for start in range(part * chunk, end, BT):
        rows = start + tl.arange(0, BT)
        tile = remade(source, rstd, weight, rows, cols, end, IN, KIND)
        tile = tl.where(keep(rows, cols, IN, seed_n, threshold), tile, 0.0).to(source.dtype.element_ty)
        at = g + rows.to(tl.int64)[:, None] * (N * R) + n * R + ranks[None, :]
        grad = tl.load(at, mask=(rows[:, None] < end) & (ranks[None, :] < R), other=0.0)
        total = tl.dot(tl.trans(grad), tile, total)
    to = out + (part * N * R + n * R + ranks).to(tl.int64)[:, None] * IN + cols[None, :]
    tl.store(to, total * scale, mask=(ranks[:, None] < R) & (cols[None, :] < IN))


@triton.jit(do_not_specialize=["seed"])
def lora_grad_x(
    dx, g, a, gate_up, tokens, scale, seed, threshold,
    N: tl.constexpr, R: tl.constexpr, IN: tl.constexpr, GATE: tl.constexpr,
    BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """dx[T, I] += scale * sum over n of dropout_n(g_n[T, R] @ a_n[R, I]); with GATE, gate_up gets its gradient from that
    instead."""
    cols, rows = tl.program_id(0) * BI + tl.arange(0, BI), tl.program_id(1) * BT + tl.arange(0, BT)
    ranks = tl.arange(0, BR)
    total = tl.zeros((BT, BI), tl.float32)
    for n in tl.static_range(N):
        at = g + rows.to(tl.int64)[:, None] * (N * R) + n * R + ranks[None, :]
        grad = tl.load(at, mask=(rows[:, None] < tokens) & (ranks[None, :] < R), other=0.0)
        here = (ranks[:, None] < R) & (cols[None, :] < IN)
        weights = tl.load(a + (n * R + ranks)[:, None] * IN + cols[None, :], mask=here, other=0.0)
        seed_n = projection_seed(seed, tl.full((), n, tl.uint32))
        total += tl.where(keep(rows, cols, IN, seed_n, threshold), tl.dot(grad, weights), 0.0)
    to = dx + rows.to(tl.int64)[:, None] * IN + cols[None, :]
    inside = (rows[:, None] < tokens) & (cols[None, :] < IN)
    total = tl.load(to, mask=inside, other=0.0).to(tl.float32) + total * scale
    if GATE:
        at = gate_up + rows.to(tl.int64)[:, None] * 2 * IN + cols[None, :]
        gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at + IN, mask=inside, other=0.0).to(tl.float32)
        dgate, dup = gated_back(total, gate, up)
        tl.store(at, dgate.to(gate_up.dtype.element_ty), mask=inside)
        tl.store(at + IN, dup.to(gate_up.dtype.element_ty), mask=inside)
    else:
        tl.store(to, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy(logits, wanted, losses, V, scale, BV: tl.constexpr):
    """A row: its loss; its logits are overwritten by their gradient times `scale`."""
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * V
    target = tl.load(wanted + row)
    cols = tl.arange(0, BV)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, V, BV):
        value = tl.load(at + start + cols, mask=start + cols < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(value, axis=0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(value - new), axis=0)
        top = new
    lse = top + tl.log(total)
    tl.store(losses + row, lse - tl.load(at + target).to(tl.float32))
    tl.debug_barrier()
    for start in range(0, V, BV):
        inside = start + cols < V
        value = tl.load(at + start + cols, mask=inside, other=float("-inf")).to(tl.float32)
        grad = tl.exp(value - lse) - tl.where(start + cols == target, 1.0, 0.0)
        tl.store(at + start + cols, (grad * scale).to(logits.dtype.element_ty), mask=inside)


@triton.jit
def dequantise(
    packed, absmax, code, out, absmax2, code2, offset, count,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, NESTED: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """NF4 (bitsandbytes' layout: high half byte first, one scale for BLOCK values, scales quantised too if NESTED)."""
    at = tl.program_id(0) * B + tl.arange(0, B)
    inside = at < count
    byte = tl.load(packed + at // 2, mask=inside, other=0).to(tl.int32)
    value = tl.load(code + tl.where(at % 2 == 0, byte >> 4, byte & 15))
    block = at // BLOCK
    scale = tl.load(absmax + block, mask=inside, other=0)
    if NESTED:
        scale = tl.load(code2 + scale.to(tl.int32)) * tl.load(absmax2 + block // BLOCK2, mask=inside, other=0.0)
        scale += tl.load(offset)
    tl.store(out + at, (value * scale).to(out.dtype.element_ty), mask=inside)
