"""The fused path's hand-written gradients are autograd's, in every architecture that it covers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from services.finetune import packing
from services.finetune.config import RunConfig, override
from services.finetune.templates import Encoded
from services.finetune.train import ops_torch
from services.finetune.train.adapters import Uncovered
from services.finetune.train.batch import flatten
from services.finetune.train.fused import Fused, _mixed
from services.finetune.train.model import load_model, summed_loss, trainable
from tests.finetune.train.test_model import FAMILIES, SMALL, samples, tensors
from tests.tiny import tiny_model

CPU = torch.device("cpu")
LAYERS = ["sliding_attention", "full_attention"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
COVERED: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama 3 rope, biases": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True),
    "mistral, window 6": lambda: MistralConfig(**SMALL, sliding_window=6),
    "qwen2, windows": lambda: Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=6, layer_types=LAYERS, tie_word_embeddings=True
    ),
    "qwen3, normed heads": lambda: Qwen3Config(**SMALL),
}


def adapted(config: Any, targets: Any = "all-linear", dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a missing factor or term
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                parameter.mul_(3.0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    for parameter in trainable(wrapped).values():
        torch.nn.init.normal_(parameter, std=0.2)
    return wrapped


def by_autograd(model: Any, blocks: packing.Blocks) -> tuple[float, dict[str, torch.Tensor]]:
    learned = int((blocks.labels >= 0).sum())
    loss = summed_loss(model, *tensors(blocks)) / learned
    loss.backward()
    grads = {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}
    return float(loss.detach()), grads


def by_hand(fused: Fused, model: Any, blocks: packing.Blocks, seed: int = 1) -> tuple[float, dict[str, torch.Tensor]]:
    fused.adapters.begin()
    learned = int((blocks.labels >= 0).sum())
    loss = float(fused.backprop(flatten(blocks, np.arange(len(blocks)), CPU), learned, seed))
    return loss, {name: p.grad.clone() for name, p in trainable(model).items() if p.grad is not None}


def check_same(ours: tuple[float, dict[str, torch.Tensor]], theirs: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name, gradient in theirs[1].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(ours[1][name], gradient, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("family", COVERED)
def test_loss_and_gradients_are_autograds(family: str) -> None:
    model = adapted(COVERED[family]())
    blocks = packing.pack(samples(), 64, True)
    theirs = by_autograd(model, blocks)
    fused = Fused(model, ops_torch, 64)
    check_same(by_hand(fused, model, blocks), theirs)
    fused.recomputed = 1
    check_same(by_hand(fused, model, blocks), theirs)
    # A second look through the model itself: stacking its weights changed nothing for generate and save.
    model.zero_grad()
    check_same(by_autograd(model, blocks), theirs)


def test_a_loss_scale_is_on_gradients_alone() -> None:
    model = adapted(LlamaConfig(**SMALL))
    blocks = packing.pack(samples(), 64, True)
    fused = Fused(model, ops_torch, 64)
    loss, plain = by_hand(fused, model, blocks)
    fused.adapters.begin()
    learned = int((blocks.labels >= 0).sum())
    assert float(fused.backprop(flatten(blocks, np.arange(len(blocks)), CPU), learned, 1, 1024.0)) == loss
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad / 1024, plain[name])


@pytest.mark.parametrize("family", COVERED)
def test_a_look_is_the_models_own_loss_without_dropout(family: str) -> None:
    model = adapted(COVERED[family](), dropout=0.5).eval()
    blocks = packing.pack(samples(), 64, True)
    fused = Fused(model, ops_torch, 64)
    fused.head_rows = 7
    fused.adapters.begin()
    flat = flatten(blocks, np.arange(len(blocks)), CPU)
    with torch.no_grad():
        theirs = float(summed_loss(model, *tensors(blocks)))
    assert float(fused.loss(flat)) == pytest.approx(theirs, rel=1e-5)
    assert float(fused.backprop(flat, 1, 7)) != pytest.approx(theirs, rel=1e-3), "training still drops"


def test_restored_weights_are_the_ones_that_train() -> None:
    model = adapted(LlamaConfig(**SMALL))
    blocks = packing.pack(samples(), 64, True)
    fused = Fused(model, ops_torch, 64)
    state = {name: t.clone() for name, t in peft.get_peft_model_state_dict(model).items()}
    before = by_hand(fused, model, blocks)
    fused.adapters.master.mul_(0.5)
    assert by_hand(fused, model, blocks)[0] != before[0]
    peft.set_peft_model_state_dict(model, state)
    check_same(by_hand(fused, model, blocks), before)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], ["k_proj", "gate_proj"]])
def test_some_layers_adapted_and_blocks_unpacked(targets: list[str]) -> None:
    model = adapted(Qwen2Config(**SMALL), targets=targets)
    blocks = packing.pack(samples(), 64, False)
    theirs = by_autograd(model, blocks)
    check_same(by_hand(Fused(model, ops_torch, 64), model, blocks), theirs)


class Masked(torch.nn.Module):
    """Dropout by the fused path's masks."""

    def __init__(self, drop: ops_torch.Drop, n: int) -> None:
        super().__init__()
        self.drop, self.n = drop, n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * ops_torch.keep(x[0], self.drop, self.n) / (1 - self.drop.p)


def test_dropout_is_the_same_forward_and_backward_and_each_projections_own() -> None:
    model = adapted(LlamaConfig(**SMALL), dropout=0.25)
    model.train()
    draw = np.random.default_rng(1)
    blocks = packing.pack([Encoded(draw.integers(3, 64, 64).tolist(), [True] * 64)], 64, True)
    fused = Fused(model, ops_torch, 64)
    loss, grads = by_hand(fused, model, blocks, seed=7)
    assert by_hand(fused, model, blocks, seed=7)[0] == loss != by_hand(fused, model, blocks, seed=8)[0]
    for parameter in trainable(model).values():
        parameter.grad = None
    places = {"q_proj": (0, 0), "k_proj": (0, 1), "v_proj": (0, 2), "o_proj": (1, 0)}
    places |= {"gate_proj": (2, 0), "up_proj": (2, 1), "down_proj": (3, 0)}
    masks = set()
    for number, layer in enumerate(model.get_base_model().model.layers):
        for name, (group, n) in places.items():
            drop = ops_torch.Drop(0.25, _mixed(7, number) + group)
            owner = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            getattr(owner, name).lora_dropout["default"] = Masked(drop, n)
            masks.add(tuple(ops_torch.keep(torch.zeros(64, 32), drop, n).flatten().tolist()))
    assert len(masks) == 14
    kept = np.mean([np.mean(m) for m in masks])
    assert kept == pytest.approx(0.75, abs=0.01)
    check_same((loss, grads), by_autograd(model, blocks))


def test_qlora_reads_the_quantised_base(tmp_path: Path) -> None:
    changes = {"lora.rank": 4, "lora.dropout": 0.0, "model.dtype": "float32"}
    model = load_model(tiny_model(tmp_path / "tiny"), override(RunConfig(), changes), torch.float32)
    for name, parameter in trainable(model).items():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    blocks = packing.pack(samples(), 64, True)
    fused = Fused(model, ops_torch, 64)
    assert all(g.weight is None for layer in fused.layers for g in layer.groups)
    ours = by_hand(fused, model, blocks)
    model.zero_grad()
    theirs = by_autograd(model.train(), blocks)  # in eval, bitsandbytes repacks weights for the processor
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-2, atol=1e-4)


def test_changing_one_document_leaves_the_others_losses_alone() -> None:
    model = adapted(LlamaConfig(**SMALL))
    fused = Fused(model, ops_torch, 64)
    first, *rest = samples()
    mute = [type(s)(s.ids, [False] * len(s.ids)) for s in rest]
    losses = set()
    for ids in (mute[0].ids, mute[0].ids[::-1]):
        blocks = packing.pack([first], 64, True)
        for n, sample in enumerate([type(first)(ids, mute[0].mask), *mute[1:]], 2):
            at = int((blocks.segments > 0).sum())
            to = slice(at, at + len(sample.ids))
            blocks.ids[0, to], blocks.positions[0, to], blocks.segments[0, to] = (
                sample.ids,
                np.arange(len(sample.ids)),
                n,
            )
        losses.add(by_hand(fused, model, blocks)[0])
    assert len(losses) == 1


@pytest.mark.parametrize("family", ["gemma2, window 6, capped", "gpt2, learned positions", "granite, scaled"])
def test_what_is_not_covered_is_named(family: str) -> None:
    lora = peft.LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=family.startswith("gpt2"))
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(FAMILIES[family]()), lora)
    with pytest.raises(Uncovered, match=r"ForCausalLM|LMHeadModel"):
        Fused(model, ops_torch, 64)


def test_what_the_fused_path_has_no_code_for_is_not_covered() -> None:
    for options in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["model.norm"]},
        {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_proj": 2}},
    ):
        model = peft.get_peft_model(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), peft.LoraConfig(**options))
        with pytest.raises(Uncovered):
            Fused(model, ops_torch, 64)
    with pytest.raises(Uncovered, match="trained whole"):
        Fused(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), ops_torch, 64)


def test_rslora_and_layers_of_their_own_rank_are_covered() -> None:
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="sdpa")
    lora = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True, rank_pattern={r"^model\.layers\.0\..*": 2}
    )
    model = peft.get_peft_model(causal, lora)
    for parameter in trainable(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    blocks = packing.pack(samples(), 64, True)
    theirs = by_autograd(model, blocks)
    check_same(by_hand(Fused(model, ops_torch, 64), model, blocks), theirs)
