"""Attention document by document gives what dense masks give, and asks for no score across documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig
from transformers.integrations import sdpa_attention

from services.finetune.train.attention import attend_by_document, attends_by_document
from services.finetune.train.model import summed_loss
from tests.finetune.train.test_model import SMALL

SEGMENTS = torch.tensor([[1] * 9 + [2] * 3 + [3] * 4, [1] * 12 + [0] * 4])


def loss_of(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(3, 64, SEGMENTS.shape)
    positions = torch.cat([torch.arange(n) for n in (9, 3, 4, 12, 4)]).view(SEGMENTS.shape)
    labels = ids.masked_fill((SEGMENTS == 0) | (positions == 0), -100)
    return summed_loss(model, ids, labels, positions, SEGMENTS)


@pytest.mark.parametrize("config", [LlamaConfig(**SMALL), MistralConfig(**SMALL, sliding_window=5)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_are_those_of_dense_masks(config: Any, recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    if recomputed:
        model.gradient_checkpointing_enable()
    dense = loss_of(model)
    dense.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    attend_by_document(model)
    assert attends_by_document(model)
    sizes: list[int] = []
    plain = sdpa_attention.sdpa_attention_forward

    def counted(module: Any, query: Any, *args: Any, **given: Any) -> Any:
        sizes.append(query.shape[2])
        return plain(module, query, *args, **given)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    loss = loss_of(model)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(dense.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)
    assert sizes == [9, 3, 4, 12, 4] * 2 * (2 if recomputed else 1)


def test_a_model_that_hands_nothing_on_keeps_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is called without documents goes as before: sampling, another's forward."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    model.eval()
    before = float(loss_of(model).detach())
    attend_by_document(model)
    assert float(loss_of(model).detach()) == pytest.approx(before, rel=1e-6)
    llama = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="sdpa").eval()
    ids = torch.randint(3, 64, (1, 7))
    answer = llama.generate(ids, max_new_tokens=5, do_sample=False)
    attend_by_document(llama)
    assert torch.equal(llama.generate(ids, max_new_tokens=5, do_sample=False), answer)
