"""How many layers keep what their backward pass needs, and how many run forward twice: a plan from the free memory for the
fused path, a choice of layers for autograd."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from services.finetune.config import ModelConfig
from services.finetune.errors import FailedPrecondition

SPARE = 0.06
"""Part of the free memory that is left to what the plan does not see: kernels' workspaces, holes between tensors."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in bytes, for one micro-step."""

    layers: int
    recomputed: int
    per_layer: int
    """Kept by a layer that is not recomputed, beside its input."""
    working: int
    """Held for a moment by the layer or the head at work."""

    def __str__(self) -> str:
        return (
            f"{self.layers - self.recomputed} of {self.layers} layers keep {self.per_layer / 2**20:,.0f} MiB each, "
            f"{self.recomputed} run forward twice"
        )


def plan(fused: Any, tokens: int, free: int) -> Plan:
    """The plan for micro-steps of up to `tokens` tokens in `free` bytes. Lengths in elements of the computing dtype."""
    item = fused.head.element_size()
    layer = fused.layers[0]
    hidden, vocabulary = fused.embedding.shape[1], fused.head.shape[0]
    qkv, gate_up = layer.qkv.shape[0], layer.gate_up.shape[0]
    ranks = max(sum(g.a_copy.shape[0] if g.adapted else 0 for g in each.groups) for each in fused.layers)
    mixed = layer.out.shape[1]
    raw = qkv if layer.heads.q_weight is not None else 0
    small = 8 + 4 * layer.heads.queries
    per_layer = tokens * (item * (hidden + qkv + raw + mixed + gate_up + ranks) + small)
    weights = 0 if layer.qkv.weight is not None else item * max(g.shape[0] * g.shape[1] for g in layer.groups)
    backward = tokens * item * max(3 * hidden + gate_up // 2, 2 * hidden + 3 * qkv)
    head = tokens * item * 4 * hidden + fused.head_rows * vocabulary * item
    # A layer that runs forward again holds its own share once more while it does.
    working = max(weights + backward + per_layer, head) + tokens * item * 2 * hidden
    inputs = tokens * item * hidden * len(fused.layers)
    room = int(free * (1 - SPARE)) - working - inputs
    kept = max(0, min(len(fused.layers), room // per_layer))
    return Plan(len(fused.layers), len(fused.layers) - kept, per_layer, working)


def bound(made: Plan, config: ModelConfig) -> Plan:
    """The plan within what `model.gradient_checkpointing` allows."""
    least = {"full": made.layers, "selective": -(-made.layers // config.gradient_checkpointing_every)}
    recomputed = max(made.recomputed, least.get(config.gradient_checkpointing, 0))
    return replace(made, recomputed=0 if config.gradient_checkpointing == "none" else recomputed)


def recompute(causal: Any, config: ModelConfig, device: torch.device) -> str:
    """Let layers of a transformers model run forward again in autograd's backward pass; which, in words.

    What autograd keeps is known only once it is kept, so auto is all layers on a GPU, and none where memory is the host's.
    FailedPrecondition (MODEL_NOT_TRAINABLE) for a model that cannot do what is asked.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    wanted = config.gradient_checkpointing
    layers = [m for m in causal.modules() if isinstance(m, GradientCheckpointingLayer)]
    able = bool(layers) and causal.supports_gradient_checkpointing
    if wanted == "auto":
        wanted = "full" if device.type == "cuda" and able else "none"
    if wanted == "none":
        return "no layer runs forward twice"
    if not able:
        raise FailedPrecondition(
            f"{type(causal).__name__} cannot run layers forward again; set model.gradient_checkpointing to none",
            reason="MODEL_NOT_TRAINABLE",
        )
    causal.gradient_checkpointing_enable({"use_reentrant": False})
    # Only reentrant checkpoints need inputs with a gradient, and it would have to be computed.
    causal.disable_input_require_grads()
    every = config.gradient_checkpointing_every if wanted == "selective" else 1
    for n, layer in enumerate(layers):
        layer.gradient_checkpointing = n % every == 0
    return f"{-(-len(layers) // every)} of {len(layers)} layers run forward twice"


def spare(causal: Any) -> str:
    """Let all layers run forward again, if they do not yet and can; what was done, in words."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in causal.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not causal.supports_gradient_checkpointing or all(layer.gradient_checkpointing for layer in layers):
        return ""
    causal.gradient_checkpointing_enable({"use_reentrant": False})
    causal.disable_input_require_grads()
    return "layers run forward twice"


def free_bytes(device: torch.device) -> int:
    """Bytes that torch can still hand out on a GPU: free on it, or held by torch's allocator and unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
