"""Forward and backward of Llama-shaped models by hand: few kernels, little saved, nothing waits for the host.

A step over flat tokens (batch.py): each layer's forward keeps what its backward needs and no more; inputs of linear layers
are made anew from what is kept anyway. Gradients of LoRA weights are written where the optimizer reads them (adapters.py).
`ops` is ops_triton on a GPU, ops_torch anywhere. Letters in shapes: T tokens, D hidden, O outputs, K learned, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from services.finetune.modules import is_seeing
from services.finetune.plan import HEAD_ROWS
from services.finetune.shape import FUSED
from services.finetune.train.adapters import Adapters, Group, Uncovered, make_group
from services.finetune.train.batch import Flat
from services.finetune.train.dealt import Dealt
from services.finetune.train.ops_torch import Drop, Heads, Source, Turns
from services.finetune.train.seeing import sees

ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose tables do not change with the length of the input."""
LARGE = 2**37
"""Products of more multiplications than this leave room on a GPU for small kernels beside them, and time to ask for it."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer, as the fused path sees it."""

    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    norm_in: Tensor
    norm_mid: Tensor
    heads: Heads
    scale: float
    window: int

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        return (self.qkv, self.out, self.gate_up, self.down)


class Kept(NamedTuple):
    """What a layer's backward pass needs of its forward pass. The xa are x @ a^T of each group."""

    h: Tensor
    rstd: Tensor
    raw: Tensor | None
    qkv: Tensor
    qkv_xa: Tensor
    mixed: Tensor
    attention: Any
    out_xa: Tensor
    h_mid: Tensor
    rstd_mid: Tensor
    gate_up: Tensor
    gate_up_xa: Tensor
    down_xa: Tensor


class Fused:
    """A PEFT model's training step. Uncovered where the model has something that this code does not know."""

    def __init__(self, model: Any, ops: Any, positions: int, dealt: Dealt | None = None) -> None:
        if not hasattr(model, "get_base_model"):
            raise Uncovered("weights that are trained whole")
        causal = model.get_base_model()
        self.layers = layers_of(causal, dealt)
        self.dealt = dealt
        decoder, config = decoder_of(causal), causal.config.get_text_config()
        self.ops = ops
        self.dtype = causal.dtype
        self.eps = float(config.rms_norm_eps)
        self.embedding: Tensor = decoder.embed_tokens.weight
        self.head: Tensor = causal.lm_head.weight
        self.norm: Tensor = decoder.norm.weight
        device = self.head.device
        self.adapters = Adapters([g for layer in self.layers for g in layer.groups], self.dtype, device)
        named = [(n, p) for n, p in causal.named_parameters() if p.requires_grad]
        self.beside = [p for n, p in named if sees(causal) and is_seeing(n)]
        """What is trained beside the decoder's linear layers: their gradients come by autograd."""
        known = sum(p.numel() for p in self.beside) + self.adapters.master.numel()
        if known != sum(p.numel() for _, p in named):
            raise Uncovered("trainable weights outside the decoder's linear layers")
        self.side = torch.cuda.Stream() if device.type == "cuda" else None
        dummy = torch.zeros(1, dtype=torch.float32, device=device)
        cos, sin = decoder.rotary_emb(dummy, torch.arange(positions, device=device)[None])
        half = self.layers[0].heads.size // 2
        self.tables = tuple(t[0, :, :half].contiguous() for t in (cos, sin))
        self.head_rows = HEAD_ROWS
        self.recomputed = 0
        """So many layers, from the first, keep their input only and run forward again in the backward pass."""
        self.entered = 0
        """Layers of a micro-step that were put in place so far, forward and back; whoever begins one sets it to 0."""

    @torch.no_grad()
    def embed(self, flat: Flat, features_MD: Tensor | None = None) -> Tensor:
        """The first layer's input [T, D], with features at the places of images' tokens."""
        h_TD = functional.embedding(flat.ids_T, self.embedding)
        if features_MD is not None and flat.images_M is not None:
            h_TD.index_copy_(0, flat.images_M, features_MD.to(h_TD.dtype))
        return h_TD

    def backprop(self, flat: Flat, learned: int, seed: int, scale: float = 1.0) -> Tensor:
        """The cross entropy summed over `flat`'s learned tokens, by `learned`; its gradients times `scale` are added to the
        adapters'.

        `seed` decides the dropout, together with layer and projection.
        """
        if not self.adapters.master.numel():
            # Rows without an image, and nothing of the language model is trained: there is nothing to go back for.
            loss = self.loss(flat) / learned
            self.go_along()
            return loss
        return self.backprop_from(self.embed(flat), flat, learned, seed, scale)[0]

    @torch.no_grad()
    def backprop_from(
        self, h_TD: Tensor, flat: Flat, learned: int, seed: int, scale: float = 1.0, needs_dx: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As backprop, from the first layer's input on; (the loss, with `needs_dx` that input's gradient times `scale`)."""
        turns = Turns(self.tables[0], self.tables[1], flat.positions_T)
        delta_TD: Tensor | None = None
        kept: list[Any] = []
        for n, layer in self._forwards():
            if n < self.recomputed:
                h_TD = h_TD if delta_TD is None else h_TD + delta_TD
                kept.append(h_TD)
                h_TD, delta_TD, _ = self._forward(layer, h_TD, None, turns, flat, _mixed(seed, n))
            else:
                h_TD, delta_TD, saved = self._forward(layer, h_TD, delta_TD, turns, flat, _mixed(seed, n))
                kept.append(saved)
        loss, grad_TD = self._loss(h_TD, delta_TD, flat, learned, scale)
        del h_TD, delta_TD
        for n, layer in self._backwards():
            saved = kept.pop()
            if n < self.recomputed:
                saved = self._forward(layer, saved, None, turns, flat, _mixed(seed, n))[2]
            self._backward(layer, grad_TD, saved, turns, flat, _mixed(seed, n), first=n == 0 and not needs_dx)
        return loss, grad_TD

    @torch.no_grad()
    def loss(self, flat: Flat, features_MD: Tensor | None = None) -> Tensor:
        """The cross entropy summed over `flat`'s learned tokens, without dropout."""
        turns = Turns(self.tables[0], self.tables[1], flat.positions_T)
        h_TD, delta_TD = self.embed(flat, features_MD), None
        with self._without_dropout():
            for _, layer in self._forwards():
                h_TD, delta_TD, _ = self._forward(layer, h_TD, delta_TD, turns, flat, 0)
        x_KD = self.ops.add_norm(h_TD, delta_TD, self.norm, self.eps)[1].index_select(0, flat.where_K)
        pairs = zip(x_KD.split(self.head_rows), flat.wanted_K.split(self.head_rows), strict=True)
        return torch.cat([self.ops.cross_entropy(rows @ self.head.t(), wanted, 1.0) for rows, wanted in pairs]).sum()

    def go_along(self, backward: bool = True) -> None:
        """Take part in what other ranks compute of the micro-step that is begun: where weights are dealt out, they need
        this one's part of each layer that is left."""
        while self.entered < (2 if backward else 1) * len(self.layers):
            self._enter()

    def _forwards(self) -> Iterator[tuple[int, Layer]]:
        """The layers by number, each with its weights in place until the next is asked for."""
        self.entered = 0
        for layer in self.layers:
            yield self._enter(), layer

    def _backwards(self) -> Iterator[tuple[int, Layer]]:
        for layer in reversed(self.layers):
            yield self._enter(), layer

    def _enter(self) -> int:
        """Put the micro-step's next layer in place; its number."""
        layers, at = len(self.layers), self.entered
        n, then = (at, at + 1) if at < layers else (2 * layers - 1 - at, 2 * layers - 2 - at)
        if self.dealt is not None:
            self.dealt.enter(n, then)
        self.entered += 1
        return n

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        groups = [group for layer in self.layers for group in layer.groups]
        before = [group.p for group in groups]
        for group in groups:
            group.p = 0.0
        try:
            yield
        finally:
            for group, p in zip(groups, before, strict=True):
                group.p = p

    @torch.no_grad()
    def logits(self, flat: Flat) -> Tensor:
        """[T, V], with the dropout of seed 0."""
        turns = Turns(self.tables[0], self.tables[1], flat.positions_T)
        h_TD, delta_TD = functional.embedding(flat.ids_T, self.embedding), None
        for n, layer in self._forwards():
            h_TD, delta_TD, _ = self._forward(layer, h_TD, delta_TD, turns, flat, _mixed(0, n))
        logits: Tensor = self.ops.add_norm(h_TD, delta_TD, self.norm, self.eps)[1] @ self.head.t()
        return logits

    def _forward(
        self, layer: Layer, h_TD: Tensor, delta_TD: Tensor | None, turns: Turns, flat: Flat, seed: int
    ) -> tuple[Tensor, Tensor, Kept]:
        """(h, delta): the layer's output is their sum."""
        ops = self.ops
        h_TD, x_TD, rstd = ops.add_norm(h_TD, delta_TD, layer.norm_in, self.eps)
        qkv_TO, qkv_xa = self._linear(layer.qkv, x_TD, seed)
        raw = qkv_TO if layer.heads.q_weight is not None else None
        qkv_TO = ops.rope(qkv_TO, turns, layer.heads)
        mixed, attention = ops.attend(qkv_TO, layer.heads, flat.extent, layer.scale, layer.window)
        delta_TD, out_xa = self._linear(layer.out, mixed, seed + 1)
        mid_TD, x_TD, rstd_mid = ops.add_norm(h_TD, delta_TD, layer.norm_mid, self.eps)
        gate_up, gate_up_xa = self._linear(layer.gate_up, x_TD, seed + 2)
        delta_TD, down_xa = self._linear(layer.down, ops.swiglu(gate_up), seed + 3)
        kept = Kept(
            h_TD, rstd, raw, qkv_TO, qkv_xa, mixed, attention, out_xa, mid_TD, rstd_mid, gate_up, gate_up_xa, down_xa
        )
        return mid_TD, delta_TD, kept

    def _backward(
        self, layer: Layer, grad_TD: Tensor, kept: Kept, turns: Turns, flat: Flat, seed: int, first: bool
    ) -> None:
        """In place: `grad_TD` of the layer's output becomes that of its input (not so for the first: nobody asks)."""
        ops = self.ops
        # From here on kept.gate_up is the gradient of gate and up.
        self._linear_back(layer.down, grad_TD, kept.down_xa, Source("gated", kept.gate_up), seed + 3)
        source = Source("normed", kept.h_mid, kept.rstd_mid, layer.norm_mid)
        dx_TD = self._linear_back(layer.gate_up, kept.gate_up, kept.gate_up_xa, source, seed + 2)
        ops.norm_back(grad_TD, dx_TD, kept.h_mid, kept.rstd_mid, layer.norm_mid)
        dmixed = self._linear_back(layer.out, grad_TD, kept.out_xa, Source("plain", kept.mixed), seed + 1)
        heads = layer.heads
        dq, dk, dv = ops.attend_back(
            dmixed, kept.mixed, kept.attention, kept.qkv, heads, flat.extent, layer.scale, layer.window
        )
        dqkv_TO = ops.rope_back(dq, dk, dv, kept.raw, turns, heads)
        source = Source("normed", kept.h, kept.rstd, layer.norm_in)
        dx_TD = self._linear_back(layer.qkv, dqkv_TO, kept.qkv_xa, source, seed, needs_dx=not first)
        if not first:
            ops.norm_back(grad_TD, dx_TD, kept.h, kept.rstd, layer.norm_in)

    def _linear(self, group: Group, x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(x W^T + bias + scale * dropout(x) A^T B^T, the dropped and scaled x A^T)."""
        weight, adapted = group.dense(self.ops, self.dtype), group.adapted
        if not adapted:
            return functional.linear(x, weight, group.bias), x.new_empty(0)
        xa = self.ops.lora_down(x, group.a_copy, len(adapted), group.scale, Drop(group.p, seed))
        y = x.new_empty(x.shape[0], group.shape[0])
        parts = iter(xa.chunk(len(adapted), 1))
        for projection in group.projections:
            rows = y[:, projection.rows]
            if projection.a is None:
                rows.zero_()
            else:
                torch.mm(next(parts), projection.b_copy.t(), out=rows)
        if group.bias is not None:
            y += group.bias
        return y.addmm_(x, weight.t()), xa

    def _linear_back(
        self, group: Group, dy: Tensor, xa: Tensor, source: Source, seed: int, needs_dx: bool = True
    ) -> Tensor:
        """The gradient of x; those of A and B are added to the adapters'. A "gated" source becomes its own gradient."""
        adapted, drop = group.adapted, Drop(group.p, seed)
        gate_up = source.of if source.kind == "gated" else None
        if not adapted:
            dx = dy @ group.dense(self.ops, self.dtype)
            if gate_up is not None:
                self.ops.swiglu_back(gate_up, dx)
            return dx
        parts = [dy[:, p.rows] for p in adapted]
        g = torch.empty_like(xa)
        for projection, part, g_n in zip(adapted, parts, g.chunk(len(adapted), 1), strict=True):
            torch.mm(part, projection.b_copy, out=g_n)
        beside = self.side if dy.shape[0] * group.shape[0] * group.shape[1] > LARGE else None
        with _on(beside):
            for projection, part, xa_n in zip(adapted, parts, xa.chunk(len(adapted), 1), strict=True):
                self.ops.weight_grad(projection.b_grad, part, xa_n)
            self.ops.lora_grad_a(group.a_grad, g, source, len(adapted), group.scale, drop)
        dx = dy @ group.dense(self.ops, self.dtype) if needs_dx else dy
        if beside is not None:
            torch.cuda.current_stream().wait_stream(beside)
        if needs_dx:
            self.ops.lora_grad_x(dx, g, group.a_copy, len(adapted), group.scale, drop, gate_up)
        return dx

    def _loss(
        self, h_TD: Tensor, delta_TD: Tensor | None, flat: Flat, learned: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(loss, the gradient of the last layer's output times `scale`). Only learned tokens reach the head."""
        h_TD, x_TD, rstd = self.ops.add_norm(h_TD, delta_TD, self.norm, self.eps)
        x_KD = x_TD.index_select(0, flat.where_K)
        losses = []
        for rows_KD, wanted_K in zip(x_KD.split(self.head_rows), flat.wanted_K.split(self.head_rows), strict=True):
            logits_KV = rows_KD @ self.head.t()
            losses.append(self.ops.cross_entropy(logits_KV, wanted_K, scale / learned))
            torch.mm(logits_KV, self.head, out=rows_KD)
            del logits_KV  # before the next rows' are there
        dx_TD = x_TD.zero_().index_copy_(0, flat.where_K.long(), x_KD)
        grad_TD = torch.zeros_like(h_TD)
        self.ops.norm_back(grad_TD, dx_TD, h_TD, rstd, self.norm)
        return torch.cat(losses).sum() / learned, grad_TD


def _on(stream: Any) -> AbstractContextManager[Any]:
    """What is done within runs on `stream` after all that was asked for so far, beside what is asked for afterwards."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(stream)


def decoder_of(causal: Any) -> Any:
    """What embeds tokens and has the layers."""
    return causal.model.language_model if sees(causal) else causal.model


def check_covered(causal: Any) -> None:
    """Uncovered, saying what stands against the fused path."""
    config, name = causal.config.get_text_config(), type(causal).__name__
    if sees(causal):
        name = type(causal.model.language_model).__name__.removesuffix("Model") + "ForCausalLM"
    if name not in FUSED:
        raise Uncovered(name)
    decoder = decoder_of(causal)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in ROPES:
        raise Uncovered(f"{rope} rotary embedding")
    if config.hidden_act != "silu":
        raise Uncovered(f"activation {config.hidden_act}")
    if getattr(config, "attention_dropout", 0.0):
        raise Uncovered("dropout of attention")
    head = decoder.layers[0].self_attn.head_dim
    if head % 8 or head > 256:
        raise Uncovered(f"attention heads of size {head}")
    if type(decoder.embed_tokens) is not torch.nn.Embedding or type(causal.lm_head) is not torch.nn.Linear:
        raise Uncovered("an adapted embedding or head")


def layers_of(causal: Any, dealt: Dealt | None = None) -> list[Layer]:
    """The layers of a model with its adapters. Uncovered."""
    check_covered(causal)
    layers = [_layer(layer, causal.config.get_text_config()) for layer in decoder_of(causal).layers]
    weights = [g.weight for layer in layers for g in layer.groups if g.weight is not None]
    if dealt is not None and not all(map(dealt.owns, weights)):
        raise Uncovered("projections of one input that are not side by side")
    return layers


def _layer(layer: Any, config: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    heads = Heads(
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        float(config.rms_norm_eps),
        q_norm.weight.data if q_norm else None,
        k_norm.weight.data if k_norm else None,
    )
    return Layer(
        qkv=make_group([attention.q_proj, attention.k_proj, attention.v_proj]),
        out=make_group([attention.o_proj]),
        gate_up=make_group([mlp.gate_proj, mlp.up_proj]),
        down=make_group([mlp.down_proj]),
        norm_in=layer.input_layernorm.weight.data,
        norm_mid=layer.post_attention_layernorm.weight.data,
        heads=heads,
        scale=float(attention.scaling),
        window=_window(attention, config),
    )


def _window(attention: Any, config: Any) -> int:
    """Tokens that a layer sees, 0 for all: Mistral has one window for all layers, the others say it layer by layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds and kinds[attention.layer_idx] != "sliding_attention":
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


def _mixed(seed: int, layer: int) -> int:
    """A seed for a layer: three more follow it, all below 2^31."""
    x = (seed * 0x9E3779B97F4A7C15 + layer * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 30)) * 0x94D049BB133111EB) % 2**64
    return ((x >> 31) % 2**29) * 4
