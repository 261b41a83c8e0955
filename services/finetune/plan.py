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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.finetune.config import RunConfig, override
from services.finetune.errors import FailedPrecondition
from services.finetune.towers import Tower, images_bytes, is_seeing, read_tower, trained_of

GIB = 2**30
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_BYTES = {"adamw": 8, "paged_adamw_32bit": 8}
"""Two moments of each trainable weight, float32."""
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
    tower: Tower | None = None
    """Of a model that sees; its weights count among `parameters`, not among `linears`."""


def read_shape(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]]) -> Shape:
    """A model's shape from its config.json and the shapes of its tensors. FailedPrecondition (SHAPE_UNKNOWN)."""
    text = config.get("text_config") or config
    try:
        layers, hidden, heads = (text[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        vocabulary = text["vocab_size"]
    except KeyError as error:
        raise FailedPrecondition(f"the base's config.json has no {error}", reason="SHAPE_UNKNOWN") from error
    linears: dict[str, Linear] = {}
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    parameters = 0
    for name, shape in tensors.items():
        if tied and name.endswith("lm_head.weight"):
            continue
        parameters += math.prod(shape)
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
        tower=read_tower(config, tensors),
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
    """ "fused" or "autograd": which way services.finetune.train.engine will take."""
    return "fused" if device.gpu and dtype != "float32" and shape.architecture in FUSED else "autograd"


def lora_parameters(shape: Shape, config: RunConfig) -> int:
    return sum(one.count * config.lora.rank * (one.inputs + one.outputs) for one in adapted(shape, config).values())


def adapted(shape: Shape, config: RunConfig) -> dict[str, Linear]:
    """The linear layers that get an adapter."""
    targets = config.lora.targets
    every = "all-linear" in targets
    return {leaf: one for leaf, one in shape.linears.items() if every or leaf in targets}


def weight_bytes(shape: Shape, config: RunConfig, dtype: str) -> int:
    """The frozen base. NF4 is half a byte a weight and a scale for 64: a byte, or 4 without double quantisation."""
    whole = shape.parameters * ITEM[dtype]
    if config.quant.bits != 4:
        return whole
    linear = sum(one.parameters for one in shape.linears.values())
    scale = (1 + 4 / 256) / 64 if config.quant.double_quant else 4 / 64
    return int(whole - linear * ITEM[dtype] + linear * (0.5 + scale))


def memory(shape: Shape, config: RunConfig, batch: Batch, steps: int, device: Device, dtype: str) -> Memory:
    """The peak of a run of so many steps. On a GPU whose memory is known the fused path keeps as many layers as fit.

    FailedPrecondition (SHAPE_UNKNOWN) for methods and optimizers that have no formula yet.
    """
    if config.method not in ("lora", "qlora") or config.optim.name not in OPTIMIZER_BYTES:
        raise FailedPrecondition(f"no formula for {config.method} with {config.optim.name}", reason="SHAPE_UNKNOWN")
    adapters, beside = lora_parameters(shape, config), trained_of(shape.tower, config.lora)
    trained = adapters + beside.tower + beside.projector
    weights, optimizer = weight_bytes(shape, config, dtype), trained * OPTIMIZER_BYTES[config.optim.name]
    fused = engine(shape, config, device, dtype) == "fused"
    if fused:
        # Masters and gradients in float32 and a copy to compute with, each one flat tensor that stays.
        adapter, gradients = adapters * ITEM[dtype] + 4 * trained, 4 * trained
        free = device.memory - CONTEXT - weights - adapter - gradients - optimizer if device.memory else 1 << 62
        seen = images_bytes(shape.tower, beside, batch.images, ITEM[dtype], free)
        lay = fused_lay(shape, config, dtype)
        held = fused_bytes(lay, batch.tokens, free - seen)
        logits = min(HEAD_ROWS, batch.learned) * shape.vocabulary * ITEM[dtype]
        activations = max(0, held.peak - logits) + seen
    else:
        adapter, gradients = 4 * trained, 4 * trained
        activations = autograd_bytes(shape, config, batch, dtype)
        activations += images_bytes(shape.tower, beside, batch.images, ITEM[dtype], 1 << 62)
        # The logits, then their logarithms, then the gradients of both: three of these at a time, float32.
        logits = 12 * batch.learned * shape.vocabulary
        if config.schedule.accumulate == 1:
            # Gradients come as activations go.
            gradients = max(0, gradients - activations - logits)
    saves = device.kind == "cpu" and steps > config.report.checkpoint_every
    return Memory(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        runtime=CONTEXT if device.gpu else INTERPRETER,
        checkpoint=4 * trained + optimizer if saves else 0,
    )


def autograd_bytes(shape: Shape, config: RunConfig, batch: Batch, dtype: str) -> int:
    """What torch keeps of all layers for the backward pass: of a Llama's, with frozen weights and LoRA.

    A frozen linear layer keeps nothing, its adapter keeps its input; dropout makes one input for each adapter and keeps its
    noise beside it. A norm keeps its input in float32, attention its inputs and output, with keys and values repeated to
    all heads, SwiGLU both factors and the gate before its activation.
    """
    item, tokens, queries = ITEM[dtype], batch.tokens, shape.heads * shape.head_size
    kept = 2 * shape.hidden * 4 + 4 * queries * item + 4 * shape.heads + 3 * shape.intermediate * item
    dropped = config.lora.dropout > 0
    seen: set[str] = set()
    for leaf, one in adapted(shape, config).items():
        kept += config.lora.rank * item
        if dropped:
            kept += 2 * one.inputs * item
        elif leaf not in seen:
            kept += one.inputs * item
            seen |= next((group for group in SHARED if leaf in group), {leaf})
    # Attention turns the mask into numbers, layer by layer.
    return shape.layers * (tokens * kept + tokens * batch.length * item)


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
