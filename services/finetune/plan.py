"""What a training run will hold on each device, before anything is started; from numbers alone.

Two ways to the gradients have two formulas, `fused_bytes` for services.finetune.train.fused, which lays out its layers by
it, and `autograd_bytes` for torch's own. Units are bytes unless named. Letters: T tokens of a micro-step, D hidden, F
intermediate, Q all query heads together, V vocabulary, K learned tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from services.finetune.config import RunConfig
from services.finetune.devices import GIB, Device
from services.finetune.errors import FailedPrecondition
from services.finetune.modules import is_seeing
from services.finetune.shape import FUSED, Shape
from services.finetune.towers import Computed, images_bytes, tower_adapters, trained_of
from services.finetune.weights import (
    ITEM,
    adapted,
    dealt_bytes,
    lora_parameters,
    meant,
    trained_parameters,
    weight_bytes,
    whole,
)

_SCALE = 4 / 256
"""Of 8-bit state: a float32 for 256 numbers."""
OPTIMIZER_BYTES: Mapping[str, float] = {
    "adamw": 8,
    "paged_adamw_32bit": 8,
    "adamw_8bit": 2 + 2 * _SCALE,
    "paged_adamw_8bit": 2 + 2 * _SCALE,
    "lion": 4,
    "lion_8bit": 1 + _SCALE,
    "paged_lion_8bit": 1 + _SCALE,
}
"""State of a trained weight: two moments, Lion has one. What paging moves to the host is counted where it began."""
ROOM = 0.7
"""Part of a GPU's memory that weights, gradients and optimizer may take; the rest is for what a step computes."""
STAGES = ("", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "deepspeed_zero3_offload")
BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once, if it is not told otherwise."""
LIVE = 1_000_000_000
"""Elements that ZeRO-3 may have put together at a time: DeepSpeed's own stage3_max_live_parameters."""
HEAD_ROWS = 2048
"""Learned tokens whose logits the fused path has at a time."""
SPARE = 0.06
"""Part of a GPU's free memory that is left to what a plan does not see: kernels' workspaces, holes between tensors."""
CONTEXT = int(0.6 * GIB)
"""What CUDA and its libraries take of a GPU beside torch's allocator."""
INTERPRETER = int(0.47 * GIB)
"""Resident in a worker on a CPU beside its tensors: 0.39 once torch, transformers, peft and bitsandbytes are loaded, the
rest once they have run (torch 2.13, x86-64)."""
SHARED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Linear layers that read one input."""


@dataclass(frozen=True, slots=True)
class Memory:
    """The most that one process holds at a time, by what it is for."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    """The interpreter and its libraries on a CPU; CUDA's context on a GPU, which torch's own figures leave out."""
    checkpoint: int
    """Adapter and optimizer once more, in host memory, while a checkpoint is stored beside the next steps."""

    @property
    def peak(self) -> int:
        return sum(getattr(self, f.name) for f in dataclasses.fields(self))


@dataclass(frozen=True, slots=True)
class Batch:
    """The largest micro-step: blocks, tokens in each, learned tokens and images in all."""

    blocks: int
    length: int
    learned: int
    images: int = 0

    @property
    def tokens(self) -> int:
        return self.blocks * self.length


def engine(shape: Shape, config: RunConfig, device: Device, dtype: str) -> str:
    """ "fused", "dealt", "autograd", or the preset of ZeRO: which way services.finetune.train will take to the gradients.
    "dealt" is the fused path over weights that are dealt out, what ZeRO-3 means where that path covers the model."""
    stage, is_covered = stage_of(shape, config, device, dtype), covered(shape, config, device, dtype)
    if is_covered and stage == "deepspeed_zero3":
        return "dealt"
    return stage or ("fused" if is_covered else "autograd")


def covered(shape: Shape, config: RunConfig, device: Device, dtype: str) -> bool:
    """Whether services.finetune.train.fused has code for a run, as far as can be told from its numbers."""
    lora, quant = config.lora, config.quant
    plain = config.method in ("lora", "qlora") and not lora.use_dora
    plain = plain and all(is_seeing(name) for name in meant(shape, lora.modules_to_save))
    known = quant.bits == 0 or (quant.bits == 4 and quant.kind == "nf4")
    free = device.gpu and dtype != "float32" and not config.schedule.deterministic
    return free and plain and known and shape.architecture in FUSED


def processes(config: RunConfig) -> int:
    """Of the whole run; where it says nothing, as many as it was written for."""
    here = config.parallel.processes
    return here * config.parallel.nodes if here else config.schedule.ranks


def stage_of(shape: Shape, config: RunConfig, device: Device, dtype: str) -> str:
    """The stage of ZeRO that deals a run out, as services.finetune.train.stage chooses it; "" for whole copies."""
    asked, world = config.parallel.deepspeed, processes(config)
    if asked:
        return asked if world > 1 or asked.endswith("_offload") else ""
    if world == 1 or not device.gpu or not device.memory:
        return ""
    frozen, room = 0 if config.method == "full" else weight_bytes(shape, config, dtype), ROOM * device.memory
    trained = trained_parameters(shape, config)
    needs = needed_bytes(frozen, trained, world)
    dealt = 16 * trained + dealt_bytes(shape, config, dtype, world)
    if needs[""] > room >= dealt and covered(shape, config, device, dtype):
        return "deepspeed_zero3"  # the fused path's own: the lower ones save little of frozen weights
    if config.optim.name not in ("adamw", "paged_adamw_32bit"):
        return ""
    return next((s for s in STAGES if needs[s] <= room), STAGES[-1])


def needed_bytes(frozen: int, trainable: int, world: int) -> Mapping[str, float]:
    """What each stage keeps on a GPU: float32 weights, gradients and AdamW's two states (Rajbhandari et al. 2020, 3.1).

    DeepSpeed keeps another copy of its part of the weights, which its optimizer works on.
    """
    return {
        "": frozen + 16 * trainable,
        "deepspeed_zero1": frozen + 8 * trainable + 12 * trainable / world,
        "deepspeed_zero2": frozen + 4 * trainable + 16 * trainable / world,
        "deepspeed_zero3": (frozen + 20 * trainable) / world,
        "deepspeed_zero3_offload": 0.0,
    }


def state_bytes(config: RunConfig) -> float:
    """The optimizer's, of each trained weight. FailedPrecondition (SHAPE_UNKNOWN)."""
    if config.optim.name == "sgd":
        return 4 if config.optim.momentum else 0
    if config.optim.name not in OPTIMIZER_BYTES:
        raise FailedPrecondition(f"no formula for the state of {config.optim.name}", reason="SHAPE_UNKNOWN")
    return OPTIMIZER_BYTES[config.optim.name]


def memory(shape: Shape, config: RunConfig, batch: Batch, steps: int, device: Device, dtype: str) -> Memory:
    """The peak of a run of so many steps in each process. On a GPU whose memory is known the fused path keeps as many layers
    as fit.

    FailedPrecondition (SHAPE_UNKNOWN) for optimizers that have no formula.
    """
    trained, way = trained_parameters(shape, config), engine(shape, config, device, dtype)
    weights, optimizer = weight_bytes(shape, config, dtype), int(trained * state_bytes(config))
    # With method full the base's own weights are trained.
    adapter, gradients = (0 if config.method == "full" else 4 * trained), 4 * trained
    beside = trained_of(shape.tower, config)
    dropped = config.lora.dropout > 0 and tower_adapters(shape.tower, config.lora) > 0 and config.method != "full"
    computed = Computed(ITEM[dtype], dropped, device.gpu)
    if way in ("fused", "dealt"):
        weights = dealt_bytes(shape, config, dtype, processes(config)) if way == "dealt" else weights
        # Masters and gradients in float32 and a copy to compute with, each one flat tensor that stays.
        adapter = 4 * trained + ITEM[dtype] * lora_parameters(shape, config)
        free = device.memory - CONTEXT - weights - adapter - gradients - optimizer if device.memory else 1 << 62
        seen = images_bytes(shape.tower, beside, batch.images, computed, free)
        held = fused_bytes(fused_lay(shape, config, dtype), batch.tokens, free - seen)
        logits = min(HEAD_ROWS, batch.learned) * shape.vocabulary * ITEM[dtype]
        activations = max(0, held.peak - logits) + seen
    else:
        # The logits, then their logarithms, then the gradients of both: three of these at a time, float32.
        logits = 12 * batch.learned * shape.vocabulary
        activations = autograd_bytes(shape, config, batch, dtype, device.gpu, logits)
        free = 0 if recomputed(shape, config, device.gpu) else 1 << 62
        activations += images_bytes(shape.tower, beside, batch.images, computed, free)
        if way != "autograd":
            weights, adapter, gradients, optimizer = _dealt(way, shape, config, dtype)
        elif config.schedule.accumulate == 1:
            # Gradients come as activations go.
            gradients = max(0, gradients - activations - logits)
    saves = device.kind == "cpu" and steps > config.report.checkpoint_every
    made = Memory(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        runtime=CONTEXT if device.gpu else INTERPRETER,
        checkpoint=4 * trained + optimizer if saves else 0,
    )
    if way == "dealt":
        return made  # layers are dealt out as they are loaded
    # Before DeepSpeed deals anything out, each process has the model whole.
    loaded = weight_bytes(shape, config, dtype) + (0 if config.method == "full" else 4 * trained)
    return dataclasses.replace(made, weights=weights + max(0, loaded + made.runtime - made.peak))


def _dealt(stage: str, shape: Shape, config: RunConfig, dtype: str) -> tuple[int, int, int, int]:
    """(weights, adapter, gradients, optimizer) that a process has by a stage of ZeRO, with what DeepSpeed works in."""
    world, trained = processes(config), trained_parameters(shape, config)
    weights, state = weight_bytes(shape, config, dtype), int(trained * state_bytes(config))
    own = 0 if config.method == "full" else 4 * trained
    level, offloads = int(stage.removeprefix("deepspeed_zero")[0]), stage.endswith("_offload")
    # Its part of the weights once more in float32, and buffers that gradients are reduced in.
    part, bucket = 4 * trained // world, 4 * min(BUCKET, trained)
    optimizer = 0 if offloads else state // world + part
    gradients = 4 * trained if level == 1 else (0 if offloads else part)
    if level < 3:
        return weights, own, gradients + bucket, optimizer
    # Two weights of four bits are one element.
    halved = sum(one.parameters for one in shape.linears.values()) // 2 if config.quant.bits == 4 else 0
    live = min(LIVE * weights // (shape.parameters - halved), weights)
    kept = 0 if offloads else weights // world
    return int(kept + live), 0 if offloads else own // world, gradients + bucket, optimizer


def autograd_bytes(
    shape: Shape, config: RunConfig, batch: Batch, dtype: str, gpu: bool = False, logits: int = 0
) -> int:
    """What torch has of all layers for the backward pass: of a Llama's. `logits` is gone when a layer runs forward again.

    A frozen linear layer keeps nothing, its adapter keeps its input; dropout makes one input for each adapter and keeps its
    noise beside it. A norm keeps its input in float32, attention its inputs and output, with keys and values repeated to
    all heads, SwiGLU both factors and the gate before its activation. Weights in float32 are kept once more in what is
    computed in. DoRA keeps two outputs more of each layer, and looks at its sum with the adapter in float32.
    """
    item, tokens, queries = ITEM[dtype], batch.tokens, shape.heads * shape.head_size
    kept = 2 * shape.hidden * 4 + 4 * queries * item + 4 * shape.heads + 3 * shape.intermediate * item
    trains_whole = config.method == "full"
    # The gradient of a norm's weights wants what they are multiplied with.
    kept += 2 * shape.hidden * item if trains_whole else 0
    dropped, seen = config.lora.dropout > 0 and not trains_whole, set[str]()
    chosen = adapted(shape, config)
    for leaf, one in chosen.items():
        kept += 0 if trains_whole else config.lora.rank * item
        kept += 2 * one.outputs * item if config.lora.use_dora else 0
        if dropped:
            kept += 2 * one.inputs * item
        elif leaf not in seen:
            kept += one.inputs * item
            seen |= next((group for group in SHARED if leaf in group), {leaf})
    if gpu:
        # Attention turns the mask into numbers, layer by layer.
        kept += batch.length * item
    else:
        # Without a mask keys and values are not repeated.
        keys = shape.linears["k_proj"].outputs if "k_proj" in shape.linears else queries
        kept += 2 * (keys - queries) * item
    layer = tokens * kept
    head = item * shape.hidden * shape.vocabulary
    copies = 0
    if dtype != "float32":
        in_layers = sum(o.parameters for o in chosen.values()) if trains_whole else lora_parameters(shape, config)
        layer += item * in_layers // shape.layers
        copies = head if trains_whole else item * whole(shape, config.lora.modules_to_save)
    largest = max(one.inputs * one.outputs for one in shape.linears.values())
    if config.quant.bits and not trains_whole:
        copies += item * largest
    twice, again = recomputed(shape, config, gpu), shape.hidden
    if config.quant.bits == 8:
        # bitsandbytes' 8-bit products hold their inputs out of reach of checkpointing.
        again += 2 * shape.hidden + queries + shape.intermediate
    total = (shape.layers - twice) * layer + twice * tokens * again * item + copies
    at_work = (layer if twice else 0) + (12 * largest if config.lora.use_dora else 0)
    return total + max(0, at_work - logits)


def recomputed(shape: Shape, config: RunConfig, gpu: bool) -> int:
    """Layers that run forward twice where torch's autograd computes; services.finetune.train.memory sets them so."""
    wanted = config.model.gradient_checkpointing
    if wanted == "selective":
        return -(-shape.layers // config.model.gradient_checkpointing_every)
    return shape.layers if wanted == "full" or (wanted == "auto" and gpu) else 0


@dataclass(frozen=True, slots=True)
class Lay:
    """The fused path's sizes, in elements of the computing dtype of `item` bytes, for one token or one layer."""

    layers: int
    item: int
    hidden: int
    vocabulary: int
    qkv: int
    raw: int
    """qkv again, where heads are normed before they turn."""
    mixed: int
    gate_up: int
    ranks: int
    heads: int
    dense: int
    """The largest weight that is made anew from its quantised form; 0 where none is quantised."""
    head_rows: int = HEAD_ROWS


@dataclass(frozen=True, slots=True)
class Held:
    """What the fused path holds in a micro-step: each kept layer's, the working memory, every layer's input."""

    layers: int
    recomputed: int
    per_layer: int
    working: int
    inputs: int

    @property
    def peak(self) -> int:
        return self.inputs + self.working + (self.layers - self.recomputed) * self.per_layer


def fused_bytes(lay: Lay, tokens: int, free: int) -> Held:
    """What micro-steps of `tokens` tokens hold in `free` bytes: as many layers as fit keep what their backward needs."""
    item = lay.item
    small = 8 + 4 * lay.heads
    per_layer = tokens * (item * (lay.hidden + lay.qkv + lay.raw + lay.mixed + lay.gate_up + lay.ranks) + small)
    backward = tokens * item * max(3 * lay.hidden + lay.gate_up // 2, 2 * lay.hidden + 3 * lay.qkv)
    head = tokens * item * 4 * lay.hidden + lay.head_rows * lay.vocabulary * item
    # A layer that runs forward again holds its own share once more while it does.
    working = max(lay.dense * item + backward + per_layer, head) + tokens * item * 2 * lay.hidden
    inputs = tokens * item * lay.hidden * lay.layers
    room = int(free * (1 - SPARE)) - working - inputs
    kept = max(0, min(lay.layers, room // per_layer))
    return Held(lay.layers, lay.layers - kept, per_layer, working, inputs)


def fused_lay(shape: Shape, config: RunConfig, dtype: str) -> Lay:
    """The fused path's sizes from a model's."""
    queries, linears, chosen = shape.heads * shape.head_size, shape.linears, adapted(shape, config)

    def out(*leaves: str) -> int:
        return sum(linears[leaf].outputs for leaf in leaves if leaf in linears)

    qkv, gate_up = out("q_proj", "k_proj", "v_proj"), out("gate_proj", "up_proj")
    groups = (shape.hidden * qkv, queries * shape.hidden, shape.hidden * gate_up, shape.intermediate * shape.hidden)
    return Lay(
        layers=shape.layers,
        item=ITEM[dtype],
        hidden=shape.hidden,
        vocabulary=shape.vocabulary,
        qkv=qkv,
        raw=qkv if shape.normed_heads else 0,
        mixed=queries,
        gate_up=gate_up,
        ranks=config.lora.rank * len(chosen),
        heads=shape.heads,
        dense=max(groups) if config.quant.bits == 4 else 0,
    )
