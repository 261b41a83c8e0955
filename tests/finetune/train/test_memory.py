"""The memory plan keeps what fits, and flat batches hold every learned token once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from services.finetune import packing
from services.finetune.train import memory, ops_torch
from services.finetune.train.batch import ROUND, flatten
from services.finetune.train.checkpoint import write_tensors
from services.finetune.train.fused import Fused
from tests.finetune.train.test_fused import CPU, adapted
from tests.finetune.train.test_model import SMALL, samples


def test_more_memory_keeps_more_layers_and_no_plan_takes_more_than_there_is() -> None:
    fused = Fused(adapted(LlamaConfig(**{**SMALL, "num_hidden_layers": 8})), ops_torch, 64)
    whole = memory.plan(fused, 4096, 2**40)
    assert whole.recomputed == 0 and "8 of 8 layers" in memory.told(whole)
    assert memory.plan(fused, 4096, 0).recomputed == 8
    before = 8
    for free in range(0, 2 * (whole.working + 8 * whole.per_layer), whole.per_layer // 3):
        made = memory.plan(fused, 4096, free)
        assert made.recomputed <= before
        before = made.recomputed
        kept = made.layers - made.recomputed
        assert not kept or kept * made.per_layer + made.working <= free
    assert before == 0


def test_a_layer_keeps_what_the_plan_says() -> None:
    fused = Fused(adapted(LlamaConfig(**SMALL)), ops_torch, 64)
    flat = flatten(packing.pack(samples(), 64, True), np.arange(1), CPU)
    tokens = len(flat.ids_T)
    turns = ops_torch.Turns(fused.tables[0], fused.tables[1], flat.positions_T)
    h = torch.randn(tokens, 32)
    kept = fused._forward(fused.layers[0], h, h, turns, flat, 1)[2]
    tensors = {t.data_ptr(): t.nbytes for t in kept if isinstance(t, torch.Tensor)}
    # The plan counts a layer's input apart, and what flash attention keeps: a number for each head of a token.
    lse = tokens * 4 * fused.layers[0].heads.queries
    assert sum(tensors.values()) - kept.h.nbytes + lse == memory.plan(fused, tokens, 2**40).per_layer


def test_flat_tokens_are_the_blocks_without_padding() -> None:
    blocks = packing.pack(samples(), 64, False)
    flat = flatten(blocks, np.array([2, 0]), CPU)
    sizes = [11, 20]
    assert len(flat.ids_T) == ROUND and flat.extent.longest == ROUND - 31
    assert flat.extent.starts.tolist() == [0, 11, 31, ROUND]
    assert flat.ids_T[:31].tolist() == [*blocks.ids[2][:11], *blocks.ids[0][:20]]
    assert flat.positions_T[:31].tolist() == [n for size in sizes for n in range(size)]
    learned = [flat.ids_T[at + 1] for at in flat.where_K.tolist()]
    assert learned == flat.wanted_K.tolist() and len(learned) == int((blocks.labels[[2, 0]] >= 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_written_tensors_are_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "b|step": torch.tensor(3.0),
        "a": torch.arange(6).view(2, 3).to(dtype),
        "empty": torch.empty(0, 4),
    }
    write_tensors(tensors, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
