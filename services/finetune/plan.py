"""What a training run will take, before anything is started: steps, bytes on each device, seconds; from numbers alone.

Two ways to the gradients have two formulas, `fused_bytes` for services.finetune.train.fused, which lays out its layers by
it, and `autograd_bytes` for torch's own. Units are bytes unless named. Letters: T tokens of a micro-step, D hidden, F
intermediate, Q all query heads together, V vocabulary, K learned tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.finetune.config import RunConfig, matches, override
from services.finetune.errors import FailedPrecondition
from services.finetune.modules import in_memory, is_seeing
from services.finetune.towers import Tower, images_bytes, read_tower, tower_adapters, trained_of

GIB = 2**30
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
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
MAX_HEADER_BYTES = 64 << 20
FUSED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SHARED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
"""Linear layers that read one input."""


def cpu_has_bfloat16() -> bool:
    """Whether this machine's processor multiplies it in hardware: emulated, it is slower than float32."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


# ---------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear layers of one leaf name, over all decoder layers together; sizes are of one."""

    count: int
    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        return self.count * self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Shape:
    """A base model, as far as memory and time hang on it."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    head_size: int
    vocabulary: int
    parameters: int
    linears: Mapping[str, Linear]
    normed_heads: bool = False
    modules: Mapping[str, int] = field(default_factory=dict)
    """Parameters of every module that has some of its own, by its whole name."""
    tower: Tower | None = None
    """Of a model that sees; `linears` are those of the language model alone."""


def read_shape(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]]) -> Shape:
    """A model's shape from its config.json and the shapes of its tensors. FailedPrecondition (SHAPE_UNKNOWN)."""
    text = config.get("text_config") or config
    try:
        layers, hidden, heads = (text[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        vocabulary = text["vocab_size"]
    except KeyError as error:
        raise FailedPrecondition(f"the base's config.json has no {error}", reason="SHAPE_UNKNOWN") from error
    linears: dict[str, Linear] = {}
    tied, tower = (
        bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
        read_tower(config, tensors),
    )
    parameters, modules = 0, dict[str, int]()
    for name, shape in tensors.items():
        if tied and name.endswith("lm_head.weight"):
            continue
        parameters += math.prod(shape)
        module = in_memory(name, config).rpartition(".")[0]
        modules[module] = modules.get(module, 0) + math.prod(shape)
        if is_seeing(name):
            continue
        # What has a row for each token is the embedding or the head.
        if name.endswith(".weight") and len(shape) == 2 and vocabulary not in shape and re.search(r"\.\d+\.", name):
            leaf = name.split(".")[-2]
            known = linears.get(leaf, Linear(0, shape[1], shape[0]))
            linears[leaf] = dataclasses.replace(known, count=known.count + 1)
    if not linears:
        raise FailedPrecondition("the base's files hold no linear layers", reason="SHAPE_UNKNOWN")
    return Shape(
        architecture=_architecture(config, text),
        layers=layers,
        hidden=hidden,
        intermediate=text.get("intermediate_size") or 4 * hidden,
        heads=heads,
        head_size=text.get("head_dim") or hidden // heads,
        vocabulary=vocabulary,
        parameters=parameters,
        linears=linears,
        normed_heads=any(name.endswith("q_norm.weight") for name in tensors),
        modules=modules,
        tower=tower,
    )


def _architecture(config: Mapping[str, Any], text: Mapping[str, Any]) -> str:
    """The class of the language model. The config.json of a model that sees names it by its type alone."""
    if text is config:
        return str((config.get("architectures") or [""])[0])
    return next((n for n in FUSED if n.removesuffix("ForCausalLM").lower() == text.get("model_type", "llama")), "")


def tensor_shapes(read: Callable[[int, int], bytes]) -> dict[str, list[int]]:
    """The shapes in a safetensors file, which begins with 8 bytes of its header's length and the header, JSON. `read` gives
    (offset, length) of it. FailedPrecondition (SHAPE_UNKNOWN)."""
    try:
        length = int.from_bytes(read(0, 8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError("no header is so long")
        header = json.loads(read(8, length))
        return {name: [int(n) for n in one["shape"]] for name, one in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FailedPrecondition("the base has a file of weights without a header", reason="SHAPE_UNKNOWN") from error


# ---------------------------------------------------------------------------------------------- memory


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


@dataclass(frozen=True, slots=True)
class Device:
    """Where one process computes. `kind` is a key of DEVICES, "cpu", or empty; 0 bytes is unknown."""

    kind: str = ""
    memory: int = 0

    @property
    def gpu(self) -> bool:
        return self.kind != "cpu"


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
    if covered(shape, config, device, dtype) and needs[""] > room >= 16 * trained + dealt_bytes(shape, config, dtype):
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


def lora_parameters(shape: Shape, config: RunConfig) -> int:
    lora, total = config.lora, 0
    for leaf, one in adapted(shape, config).items():
        ranks = [
            next((r for p, r in lora.rank_pattern.items() if matches(p, n)), lora.rank) for n in _named(shape, leaf)
        ]
        mean = sum(ranks) / len(ranks) if ranks else lora.rank
        total += int(one.count * (mean * (one.inputs + one.outputs) + lora.use_dora * one.outputs))
    return total


def adapted(shape: Shape, config: RunConfig) -> dict[str, Linear]:
    """The linear layers that get an adapter; with method full all of them, which are trained themselves."""
    targets = config.lora.targets
    if "all-linear" in targets or config.method == "full":
        return dict(shape.linears)
    found = {}
    for leaf, one in shape.linears.items():
        hits = sum(any(matches(t, name) for t in targets) for name in _named(shape, leaf))
        count = one.count if leaf in targets else hits
        if count:
            found[leaf] = dataclasses.replace(one, count=count)
    return found


def _named(shape: Shape, leaf: str) -> list[str]:
    return [name for name in shape.modules if name.rpartition(".")[2] == leaf and not is_seeing(name)]


def meant(shape: Shape, patterns: Sequence[str]) -> list[str]:
    """The modules that patterns mean, with all that is in them."""

    def named(name: str) -> bool:
        parts = name.split(".")
        inside = [".".join(parts[: n + 1]) for n in range(len(parts))]
        return any(matches(pattern, one) for pattern in patterns for one in inside)

    return [name for name in shape.modules if named(name)]


def whole(shape: Shape, patterns: Sequence[str]) -> int:
    """Parameters of the modules that patterns mean, with all that is in them."""
    return sum(shape.modules[name] for name in meant(shape, patterns))


def trained_parameters(shape: Shape, config: RunConfig) -> int:
    if config.method == "full":
        return shape.parameters - whole(shape, config.model.freeze)
    lora = config.lora
    return lora_parameters(shape, config) + whole(shape, lora.modules_to_save) + tower_adapters(shape.tower, lora)


def weight_bytes(shape: Shape, config: RunConfig, dtype: str) -> int:
    """The base as it is loaded. NF4 is half a byte a weight and a scale for 64: a byte, or 4 without double quantisation;
    8 bits have a scale for each output. What is trained whole is float32."""
    if config.method == "full":
        trained = trained_parameters(shape, config)
        return 4 * trained + (shape.parameters - trained) * ITEM[dtype]
    base = shape.parameters * ITEM[dtype]
    if config.quant.bits == 0:
        return base
    linear = sum(one.parameters for one in shape.linears.values())
    scale = (1 + 4 / 256) / 64 if config.quant.double_quant else 4 / 64
    small = linear * (0.5 + scale)
    if config.quant.bits == 8:
        small = linear + sum(4 * one.count * one.outputs for one in shape.linears.values())
    return int(base - linear * ITEM[dtype] + small)


def dealt_bytes(shape: Shape, config: RunConfig, dtype: str) -> int:
    """The base as each process has it where the fused path deals layers out: its part of them, the two that are put
    together, and all else whole."""
    linear = sum(one.parameters for one in shape.linears.values())
    rest = (shape.parameters - linear) * ITEM[dtype]
    layers = weight_bytes(shape, config, dtype) - rest
    return rest + layers // processes(config) + 2 * layers // shape.layers


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
    if way in ("fused", "dealt"):
        weights = dealt_bytes(shape, config, dtype) if way == "dealt" else weights
        # Masters and gradients in float32 and a copy to compute with, each one flat tensor that stays.
        adapter = 4 * trained + ITEM[dtype] * lora_parameters(shape, config)
        free = device.memory - CONTEXT - weights - adapter - gradients - optimizer if device.memory else 1 << 62
        seen = images_bytes(shape.tower, beside, batch.images, ITEM[dtype], free)
        held = fused_bytes(fused_lay(shape, config, dtype), batch.tokens, free - seen)
        logits = min(HEAD_ROWS, batch.learned) * shape.vocabulary * ITEM[dtype]
        activations = max(0, held.peak - logits) + seen
    else:
        # The logits, then their logarithms, then the gradients of both: three of these at a time, float32.
        logits = 12 * batch.learned * shape.vocabulary
        activations = autograd_bytes(shape, config, batch, dtype, device.gpu, logits)
        free = 0 if recomputed(shape, config, device.gpu) else 1 << 62
        activations += images_bytes(shape.tower, beside, batch.images, ITEM[dtype], free)
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
    # Attention turns the mask into numbers, layer by layer.
    layer = tokens * kept + tokens * batch.length * item
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


# ---------------------------------------------------------------------------------------------- what would fit


@dataclass(frozen=True, slots=True)
class Change:
    """Other values with which a run fits, by dotted key, and its peak then. `device` is another GPU, with equal values."""

    overrides: Mapping[str, Any]
    told: str
    peak: int
    device: str = ""


def changes(shape: Shape, config: RunConfig, batch: Batch, steps: int, device: Device, dtype: str) -> list[Change]:
    """What makes a run fit that does not, the least harmful first; each is computed, none is guessed."""
    found: list[Change] = []
    for overrides, told in _candidates(config):
        other = override(config, overrides)
        blocks, length = other.schedule.batch_size, min(batch.length, other.data.max_length)
        learned = math.ceil(batch.learned * blocks * length / max(1, batch.tokens))
        peak = memory(shape, other, Batch(blocks, length, learned), steps, device, dtype).peak
        if peak <= device.memory:
            found.append(Change(overrides, told, peak))
            break
    for kind, known in sorted(DEVICES.items(), key=lambda entry: entry[1].memory):
        if device.gpu and known.memory > device.memory:
            peak = memory(shape, config, batch, steps, Device(kind, known.memory), dtype).peak
            if peak <= known.memory:
                found.append(Change({}, f"a GPU of {known.memory // GIB} GiB, as {kind}", peak, kind))
                break
    return found


def _candidates(config: RunConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """Changes from the least harmful on: the same steps in more parts, a quantised base, both, shorter rows too."""
    schedule = config.schedule
    parts = [d for d in range(2, schedule.batch_size + 1) if schedule.batch_size % d == 0]
    smaller: list[dict[str, Any]] = [
        {"schedule.batch_size": schedule.batch_size // d, "schedule.accumulate": schedule.accumulate * d} for d in parts
    ]
    for one in smaller:
        yield one, "smaller micro-steps; the steps stay the same"
    least, quantised = (smaller[-1] if smaller else {}), {"method": "qlora", "quant.bits": 4}
    if config.method == "lora":
        yield quantised, "a base in 4 bits"
        yield {**least, **quantised}, "smaller micro-steps and a base in 4 bits"
        least = {**least, **quantised}
    length = config.data.max_length // 2
    while length >= 128:
        yield {**least, "data.max_length": length}, "shorter blocks: longer rows are cut there"
        length //= 2


# ---------------------------------------------------------------------------------------------- time


@dataclass(frozen=True, slots=True)
class Known:
    """A GPU as its maker describes it: bytes, and dense TFLOP/s in bfloat16 (float16 where it has none)."""

    memory: int
    tflops: float


DEVICES: Mapping[str, Known] = {
    "h200": Known(141 * 10**9, 989),
    "h100": Known(80 * GIB, 989),
    "a100-80g": Known(80 * GIB, 312),
    "a100": Known(40 * GIB, 312),
    "l40s": Known(48 * GIB, 362),
    "a10": Known(24 * GIB, 125),
    "l4": Known(24 * GIB, 121),
    "rtx4090": Known(24 * GIB, 165),
    "v100": Known(32 * GIB, 125),
    "t4": Known(16 * GIB, 65),
}
USE = (0.12, 0.50)
"""Of a GPU's TFLOP/s: from short rows on a small model to what docs/benchmarks.md measures (0.28 to 0.49)."""


def seconds(shape: Shape, tokens: int, device: Device, recomputed: float) -> tuple[float, float] | None:
    """(least, most) seconds of training on so many tokens, by 4 FLOP for each token and weight of a product, and 2 more
    where a layer runs forward twice; None where the device's speed is not known."""
    known = DEVICES.get(device.kind)
    if known is None:
        return None
    products = sum(one.parameters for one in shape.linears.values())
    flop = tokens * (products * (4 + 2 * recomputed) + 4 * shape.hidden * shape.vocabulary)
    return flop / (known.tflops * 1e12 * USE[1]), flop / (known.tflops * 1e12 * USE[0])
