"""What must be right before speed counts: kernels, the loss of 200 steps, documents apart. For a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.finetune.config import RunConfig, override
from services.finetune.train import ops_torch, ops_triton
from services.finetune.train.batch import flatten
from services.finetune.train.engine import Autograd, Engine, choose
from services.finetune.train.methods import adapt
from services.finetune.train.model import trainable
from services.finetune.train.step import Stepper
from tests.bench.train_shapes import VOCABULARY, blocks_of, documents, nf4, random_causal, run_config

GPU = torch.device("cuda")


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def check_kernels(tokens: int = 1000, size: int = 1024, rank: int = 64) -> dict[str, float]:
    """Relative error of every kernel in bfloat16 against plain torch in float32 on the same values."""
    torch.manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, device=GPU, dtype=torch.bfloat16)  # noqa: E731
    return dict(_kernels(draw, tokens, size, rank))


def _kernels(draw: Callable[..., Tensor], t: int, d: int, r: int) -> Iterator[tuple[str, float]]:
    plain, ours = ops_torch, ops_triton
    h, delta, dx, weight = draw(t, d), draw(t, d), draw(t, d), draw(d).abs() + 0.5
    got, want = ours.add_norm(h, delta, weight, 1e-5), plain.add_norm((h + delta).float(), None, weight.float(), 1e-5)
    yield "add_norm", max(error(g, w) for g, w in zip(got, want, strict=True))
    grad, grad32 = h.clone(), h.float()
    ours.norm_back(grad, dx, got[0], got[2], weight)
    plain.norm_back(grad32, dx.float(), got[0].float(), got[2], weight.float())
    yield "norm_back", error(grad, grad32)
    gate_up, dact = draw(t, 2 * d), draw(t, d)
    yield "swiglu", error(ours.swiglu(gate_up), plain.swiglu(gate_up.float()))
    back, back32 = gate_up.clone(), gate_up.float()
    ours.swiglu_back(back, dact)
    plain.swiglu_back(back32, dact.float())
    yield "swiglu_back", error(back, back32)
    yield from _attention(draw, t)
    for p in (0.0, 0.1):
        for rank in (r, 512):
            for name, value in _lora(draw, t, d, rank, ops_torch.Drop(p, 1234567)):
                yield f"{name} rank {rank}", value
    logits, wanted = draw(300, 32000) * 3, torch.randint(0, 32000, (300,), device=GPU, dtype=torch.int32)
    logits32 = logits.float()
    yield "loss", error(ours.cross_entropy(logits, wanted, 0.5), plain.cross_entropy(logits32, wanted, 0.5))
    yield "loss_grad", error(logits, logits32)
    yield from _nf4(draw)


def _attention(draw: Callable[..., Tensor], t: int) -> Iterator[tuple[str, float]]:
    starts = torch.tensor([0, 100, 612, t], device=GPU, dtype=torch.int32)
    extent = ops_torch.Extent(starts, max(512, t - 612))
    positions = torch.arange(t, device=GPU, dtype=torch.int32)
    angles = torch.rand(t, 64, device=GPU) * 6
    turns = ops_torch.Turns(angles.cos(), angles.sin(), positions)
    for norm in (None, draw(128).abs() + 0.5):
        heads = ops_torch.Heads(8, 2, 128, 1e-5, norm, norm)
        heads32 = heads if norm is None else heads._replace(q_weight=norm.float(), k_weight=norm.float())
        qkv = draw(t, 12 * 128)
        raw, raw32 = (None, None) if norm is None else (qkv, qkv.float())
        got, want = ops_triton.rope(qkv.clone(), turns, heads), ops_torch.rope(qkv.float(), turns, heads32)
        yield f"rope{' normed' if raw is not None else ''}", error(got, want)
        dq, dk, dv = draw(t, 8, 128), draw(t, 2, 128), draw(t, 2, 128)
        got = ops_triton.rope_back(dq, dk, dv, raw, turns, heads)
        want = ops_torch.rope_back(dq.float(), dk.float(), dv.float(), raw32, turns, heads32)
        yield "rope_back", error(got, want)
    for window in (0, 100):
        out, kept = ops_triton.attend(qkv, heads, extent, 0.1, window)
        yield f"attend {window}", error(out, ops_torch.attend(qkv.float(), heads, extent, 0.1, window)[0])
        dout = draw(*out.shape)
        got3 = ops_triton.attend_back(dout, out, kept, qkv, heads, extent, 0.1, window)
        want3 = ops_torch.attend_back(dout.float(), out, None, qkv.float(), heads, extent, 0.1, window)
        yield f"attend_back {window}", max(error(g, w) for g, w in zip(got3, want3, strict=True))


def _lora(draw: Callable[..., Tensor], t: int, d: int, r: int, drop: ops_torch.Drop) -> Iterator[tuple[str, float]]:
    x, a, g, dx = draw(t, d), draw(3 * r, d), draw(t, 3 * r), draw(t, d)
    yield (
        f"lora_down {drop.p}",
        error(ops_triton.lora_down(x, a, 3, 0.25, drop), ops_torch.lora_down(x.float(), a.float(), 3, 0.25, drop)),
    )
    gate_up, both = draw(t, 2 * d), dx.clone()
    gate_up32, both32 = gate_up.float(), dx.float()
    ops_triton.lora_grad_x(both, g, a, 3, 0.25, drop, gate_up)
    ops_torch.lora_grad_x(both32, g.float(), a.float(), 3, 0.25, drop, gate_up32)
    yield f"lora_grad_x gated {drop.p}", error(gate_up, gate_up32)
    dx32 = dx.float()
    ops_triton.lora_grad_x(dx, g, a, 3, 0.25, drop)
    ops_torch.lora_grad_x(dx32, g.float(), a.float(), 3, 0.25, drop)
    yield f"lora_grad_x {drop.p}", error(dx, dx32)
    weight, rstd = draw(d).abs() + 0.5, torch.rand(t, device=GPU) + 0.5
    for source in (
        ops_torch.Source("plain", x), ops_torch.Source("normed", x, rstd, weight), ops_torch.Source("gated", draw(t, 2 * d)),
    ):  # fmt: skip
        got, want = torch.zeros(2, 3 * r, d, device=GPU).unbind()
        ops_triton.lora_grad_a(got, g, source, 3, 0.25, drop)
        same = source._replace(of=source.of.float())
        ops_torch.lora_grad_a(want, g.float(), same, 3, 0.25, drop)
        yield f"lora_grad_a {source.kind} {drop.p}", error(got, want)


def _nf4(draw: Callable[..., Tensor]) -> Iterator[tuple[str, float]]:
    for nested in (True, False):
        weight = nf4(draw(1024, 4096), nested)
        got, want = torch.empty(2, 1024, 4096, device=GPU, dtype=torch.bfloat16).unbind()
        ops_triton.dequantise(weight, got)
        ops_torch.dequantise(weight, want)
        yield f"dequantise{' nested' if nested else ''}", error(got, want)


def check_loss(steps: int = 200) -> tuple[float, float, list[float]]:
    """(largest, mean) relative difference of the loss of each step, ours in bfloat16 beside autograd's in float32, and
    our losses. Same weights, data and order; tokens that can be learned: each document repeats a few of its own."""
    config = override(
        run_config(False, 2, dropout=0.0),
        {"optim.lr": 1e-3, "schedule.warmup_ratio": 0.1, "schedule.max_steps": steps},
    )
    draw = np.random.default_rng(0)
    docs = [[int(t) for t in draw.choice(draw.integers(3, VOCABULARY["small"], 8), len(d))] for d in documents(900, 9)]
    blocks = blocks_of(docs)
    half = random_causal("small", torch.bfloat16)
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        model = adapt(copy.deepcopy(half).to(dtype), config)
        losses.append(_train(model, config, blocks, dtype, steps))
    apart = [abs(a - b) / b for a, b in zip(*losses, strict=True)]
    return max(apart), sum(apart) / len(apart), losses[0]


def _train(model: Any, config: RunConfig, blocks: Any, dtype: torch.dtype, steps: int) -> list[float]:
    engine: Engine
    if dtype == torch.float32:
        engine = Autograd(model, blocks, GPU, dtype)
    else:
        engine, why = choose(model, blocks, GPU, dtype, config.model)
        assert "fused" in why and "not covered" not in why, why
    losses: list[float] = []
    stepper = Stepper(
        config, model, trainable(model), blocks, engine, lambda told: losses.append(told.loss), lambda *_: None
    )
    for _ in range(steps):
        stepper.take()
    stepper.settle()
    return losses


def check_apart() -> tuple[bool, bool]:
    """(whether the third document's logits stay bit for bit when the first two change, whether its own tokens count)."""
    from services.finetune.train.fused import Fused

    model = adapt(random_causal("small", torch.bfloat16), run_config(False, 1))
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.05)
    fused = Fused(model, ops_triton, 2048)
    docs = np.random.default_rng(3).integers(3, VOCABULARY["small"], (6, 300)).tolist()

    def logits(*chosen: list[int]) -> Tensor:
        # Documents of one length are packed in their order.
        return fused.logits(flatten(blocks_of(list(chosen)), np.arange(1), GPU))[600:900]

    before = logits(docs[0], docs[1], docs[2])
    others = logits(docs[3], docs[4], docs[2])
    own = logits(docs[0], docs[1], docs[5])
    return bool(torch.equal(before, others)), not bool(torch.equal(before, own))
