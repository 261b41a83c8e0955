"""Plans beside the real thing: parameters, what torch keeps, what the fused path lays out, and what would fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from services.finetune import fitting, plan
from services.finetune.config import RunConfig, override
from services.finetune.devices import DEVICES, GIB, Device, seconds
from services.finetune.plan import Batch
from services.finetune.shape import Linear, Shape, read_shape
from services.finetune.store import Store
from services.finetune.train import memory, ops_torch
from services.finetune.train.attention import attend_by_document
from services.finetune.train.fused import Fused
from services.finetune.train.methods import adapt, unfreeze
from services.finetune.train.model import causal_of, summed_loss
from services.finetune.weights import lora_parameters, trained_parameters

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "head_dim": 16,
}
LLAMA_7B = Shape(
    architecture="LlamaForCausalLM",
    layers=32,
    hidden=4096,
    intermediate=11008,
    heads=32,
    head_size=128,
    vocabulary=32000,
    parameters=6_738_415_616,
    linears={
        **{leaf: Linear(32, 4096, 4096) for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")},
        **{leaf: Linear(32, 4096, 11008) for leaf in ("gate_proj", "up_proj")},
        "down_proj": Linear(32, 11008, 4096),
    },
)


def config(**changes: Any) -> RunConfig:
    given = {"method": "lora", "quant.bits": 0, "lora.rank": 8, "schedule.accumulate": 1}
    return override(RunConfig(), {**given, **{k.replace("__", "."): v for k, v in changes.items()}})


def written(kind: type[Any], folder: Path, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SIZES, **changes), dtype=torch.float32, attn_implementation="sdpa")
    model.save_pretrained(folder)
    return model


def shape_of(folder: Path) -> Shape:
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # no mapping
    return read_shape(json.loads((folder / "config.json").read_text()), tensors)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_a_shape_is_the_models(tmp_path: Path, kind: type[Any], tied: bool) -> None:
    model = written(kind, tmp_path, tie_word_embeddings=tied)
    shape = shape_of(tmp_path)
    assert shape.parameters == model.num_parameters()
    assert shape.normed_heads == (kind is Qwen3Config)
    for changes in ({}, {"lora__targets": ["q_proj", "down_proj"]}):
        wrapped = adapt(written(kind, tmp_path), config(**changes))
        assert lora_parameters(shape, config(**changes)) == sum(
            p.numel() for p in wrapped.parameters() if p.requires_grad
        )


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("changes", [{"lora__dropout": 0.0}, {"lora__dropout": 0.1}, {"method": "full"}])
def test_torch_keeps_what_the_plan_says(tmp_path: Path, changes: dict[str, Any], dense: bool) -> None:
    """Storages that autograd saves, the weights' own left out, but for the loss's. Dense masks are a GPU's."""
    chosen = config(**changes)
    model = written(LlamaConfig, tmp_path).train()
    if chosen.method != "full":
        model = adapt(model, chosen).train()
    if not dense:
        attend_by_document(causal_of(model))
    length, kept = 256, {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 300, (2, length))
    labels = torch.where(torch.arange(length) < 200, -100, ids)
    positions, segments = torch.arange(length).expand(2, -1), (torch.arange(2 * length) // 128).view(2, -1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = summed_loss(model, ids, labels, positions, segments)
    batch = Batch(2, length, int((labels >= 0).sum()))
    assert loss.requires_grad
    saved = sum(kept.values()) - 4 * batch.learned * 300
    chosen = override(chosen, {"model.gradient_checkpointing": "none"})
    planned = plan.autograd_bytes(shape_of(tmp_path), chosen, batch, "float32", gpu=dense)
    assert planned == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_the_fused_path_lays_out_what_is_planned(tmp_path: Path, kind: type[Any]) -> None:
    fused = Fused(adapt(written(kind, tmp_path), config()), ops_torch, 64)
    lay = plan.fused_lay(shape_of(tmp_path), config(), "float32")
    for free in (0, 1 << 22, 1 << 30):
        assert plan.fused_bytes(lay, 512, free) == memory.plan(fused, 512, free)


def test_what_is_trained_follows_the_patterns(tmp_path: Path) -> None:
    shape = shape_of(written(LlamaConfig, tmp_path) and tmp_path)
    for changes in (
        {
            "lora__targets": ["model.layers.[01].self_attn.*", "layers.2.mlp.up_proj"],
            "lora__rank_pattern": {"v_proj": 2},
        },
        {"lora__targets": ["q_proj"], "lora__modules_to_save": ["lm_head", "model.norm"], "lora__use_dora": True},
    ):
        wrapped = adapt(written(LlamaConfig, tmp_path), config(**changes))
        trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        assert trained_parameters(shape, config(**changes)) == trained
    frozen = config(method="full", model__freeze=["embed_tokens", "model.layers.0"])
    left = unfreeze(written(LlamaConfig, tmp_path), frozen, torch.float32)
    trained = sum(p.numel() for p in left.parameters() if p.requires_grad)
    assert trained_parameters(shape, frozen) == trained


MEASURED = [
    ("7B", "lora4", 1, 38.93), ("7B", "qlora4", 1, 30.07), ("7B", "qlora", 1, 12.35), ("7B", "fixed", 1, 15.76),
    ("7B", "offload", 1, 6.56), ("1.8B", "lora4", 1, 14.48), ("1.8B", "saved", 1, 11.80), ("1.8B", "adam8", 1, 6.90),
    ("1.8B", "full", 1, 27.45), ("1.8B", "full8", 1, 17.24), ("135M", "dora", 1, 1.75), ("135M", "int8", 1, 2.02),
    ("135M", "fp4", 1, 1.60), ("135M", "fullzero2", 2, 3.40), ("135M", "fullzero3", 2, 4.03),
    ("7B", "lora4zero3", 2, 32.17), ("7B", "qlora4zero3", 2, 27.23),
]  # fmt: skip
"""GiB that workers held of an H100 (docs/benchmarks.md): shape, case of tests/bench/plan.py, processes."""


@pytest.mark.parametrize(("shape", "case", "ranks", "gib"), MEASURED)
def test_plans_are_within_a_tenth_of_what_a_gpu_held(shape: str, case: str, ranks: int, gib: float) -> None:
    from tests.bench.plan import BASE, CASES
    from tests.bench.train_shapes import shape_of as shape_named

    changes = {**BASE, **CASES[case], "parallel.processes": ranks, "schedule.ranks": ranks, "data.max_length": 2048}
    chosen = override(RunConfig(), {**changes, "model.dtype": "bfloat16"})
    blocks = chosen.schedule.batch_size
    made = plan.memory(
        shape_named(shape), chosen, Batch(blocks, 2048, 1985 * blocks), 3, Device("h100", 80 * GIB), "bfloat16"
    )
    assert (made.peak - made.runtime) / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("method", "bits", "weights"),
    # An eighth of the layers, the two that are put together, embedding and head of 0.5 GiB each.
    [("qlora", 4, 32.7 / 8 + 2 * 32.7 / 80 + 1.0), ("lora", 0, 127.5 / 8 + 2 * 127.5 / 80 + 1.0)],
)
def test_a_70b_model_fits_eight_gpus(method: str, bits: int, weights: float) -> None:
    from tests.bench.train_shapes import shape_of as shape_named

    chosen = config(
        method=method, quant__bits=bits, lora__rank=64, data__max_length=2048, parallel__deepspeed="deepspeed_zero3",
        parallel__processes=8, model__dtype="bfloat16",
    )  # fmt: skip
    shape, device = shape_named("70B"), Device("h100", 80 * GIB)
    made = plan.memory(shape, chosen, Batch(1, 2048, 2048), 10, device, "bfloat16")
    assert made.weights / GIB == pytest.approx(weights, rel=0.02)
    assert made.peak < 75 * GIB
    assert plan.engine(shape, chosen, device, "bfloat16") == "dealt"
    # Nobody need ask for it where whole copies do not fit, whatever the optimizer.
    unasked = {"parallel.deepspeed": "", "optim.name": "adamw_8bit"}
    assert plan.engine(shape, override(chosen, unasked), device, "bfloat16") == ("fused" if bits else "dealt")
    for changes, other in (
        ({"parallel.processes": 1}, "fused"),
        ({"schedule.deterministic": True}, "deepspeed_zero3"),
        ({"lora.use_dora": True}, "deepspeed_zero3"),
        ({"parallel.deepspeed": "deepspeed_zero3_offload"}, "deepspeed_zero3_offload"),
    ):
        assert plan.engine(shape, override(chosen, changes), device, "bfloat16") == other


def test_a_large_run_names_what_fits() -> None:
    """Every change named is computed to fit, and no lesser one does."""
    chosen, batch = config(schedule__batch_size=4, data__max_length=2048, lora__rank=64), Batch(4, 2048, 8192)
    device = Device("l4", 24 * GIB)
    made = plan.memory(LLAMA_7B, chosen, batch, 100, device, "bfloat16")
    assert made.peak <= device.memory, "every layer runs forward twice, and it fits"
    small = Device("", 15 * GIB)
    assert plan.memory(LLAMA_7B, chosen, batch, 100, small, "bfloat16").peak > small.memory
    first, other = fitting.changes(LLAMA_7B, chosen, batch, 100, small, "bfloat16")
    assert first.peak <= small.memory and first.overrides["method"] == "qlora"
    assert other.device == "t4" or DEVICES[other.device].memory > small.memory
    for parts in (2, 4):
        lesser = override(chosen, {"schedule.batch_size": 4 // parts})
        peak = plan.memory(LLAMA_7B, lesser, Batch(4 // parts, 2048, 8192 // parts), 100, small, "bfloat16").peak
        assert peak > small.memory


def test_fewer_blocks_are_named_where_they_suffice() -> None:
    chosen, batch = config(schedule__batch_size=8, data__max_length=4096), Batch(8, 4096, 32768)
    device = Device("cpu", 0)
    need = [
        plan.memory(LLAMA_7B, config(schedule__batch_size=n), Batch(n, 4096, 4096 * n), 100, device, "float32").peak
        for n in (4, 8)
    ]
    found = fitting.changes(LLAMA_7B, chosen, batch, 100, Device("cpu", (need[0] + need[1]) // 2), "float32")
    assert [dict(c.overrides) for c in found] == [{"schedule.batch_size": 4, "schedule.accumulate": 2}]


def test_time_is_a_range_around_what_was_measured() -> None:
    """docs/benchmarks.md: 18,071 tokens a second on an H100."""
    found = seconds(LLAMA_7B, 18_071 * 100, Device("h100"), 0.0)
    assert found is not None and found[0] < 100 < found[1]
    assert seconds(LLAMA_7B, 1000, Device("cpu", GIB), 0.0) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "cases"),
    [
        ("135M", ("lora", "wide")),
        ("sees", ("projector", "frozen", "tower", "pictures", "kept_whole")),
        ("sees135M", ("projector", "frozen", "tower")),
    ],
)
def test_a_real_worker_holds_what_was_planned(file_store: Store, shape: str, cases: tuple[str, ...]) -> None:
    """Within a tenth."""
    from tests.bench.jobs import put_base
    from tests.bench.plan import CASES, compare
    from tests.bench.plan_shapes import SEEING, put_seeing

    base = put_seeing(file_store, shape) if shape in SEEING else put_base(file_store, shape)
    for case in cases:
        one = compare(file_store, base, CASES[case], f"jobs/plan-{case}", shape)
        assert 0.9 < one.ratio < 1.1, (case, one)
