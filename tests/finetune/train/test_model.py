"""The loss is the model's own, over exactly the tokens to learn, in every family of attention."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
)

from services.finetune import packing
from services.finetune.config import RunConfig, override, to_json
from services.finetune.errors import FailedPrecondition, InvalidArgument, out_of_memory
from services.finetune.orders import ArtifactRef, TrainRun
from services.finetune.progress import attempt_key, dump, raise_fence, read_outcome, read_segments, run_uri
from services.finetune.store import Store
from services.finetune.store.artifacts import File, Manifest, publish, publish_directory
from services.finetune.templates import Encoded
from services.finetune.train.attention import attend_by_document
from services.finetune.train.model import check_packable, load_model, summed_loss, trainable
from tests.tiny import tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS = ["sliding_attention", "full_attention"]
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "mistral, window 6": lambda: MistralConfig(**SMALL, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "gemma2, window 6, capped": lambda: Gemma2Config(
        **SMALL, sliding_window=6, layer_types=LAYERS, attn_logit_softcapping=0.5, final_logit_softcapping=0.3
    ),
    "gemma3, window 6": lambda: Gemma3TextConfig(**SMALL, sliding_window=6, layer_types=LAYERS),
    "granite, scaled": lambda: GraniteConfig(**SMALL, logits_scaling=8.0),
    "gpt_neox, other head": lambda: GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "gpt2, learned positions": lambda: GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=128),
}


class Wrapped(torch.nn.Module):
    """What summed_loss asks of a PEFT model."""

    def __init__(self, causal: Any) -> None:
        super().__init__()
        self.causal = causal

    def get_base_model(self) -> Any:
        return self.causal


def samples() -> list[Encoded]:
    draw = np.random.default_rng(0)
    return [
        Encoded(draw.integers(3, 64, size).tolist(), [n >= size // 2 for n in range(size)]) for size in (20, 17, 11, 9)
    ]


def tensors(blocks: packing.Blocks) -> list[torch.Tensor]:
    arrays = (blocks.ids, blocks.labels, blocks.positions, blocks.segments)
    return [torch.from_numpy(np.array(a)).long() for a in arrays]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_loss_is_the_models_own_loss_of_each_sample_alone(family: str, dense: bool) -> None:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh model's logits are too alike to tell right from wrong
            parameter.mul_(3.0)
        expected = 0.0
        for sample in samples():
            ids, mask = torch.tensor([sample.ids]), torch.tensor(sample.mask)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1][mask[1:]]
            wanted = ids[0, 1:][mask[1:]]
            expected += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        if not dense:
            attend_by_document(model)
        packed = packing.pack(samples(), 64, True)
        assert len(packed) == 1 and packed.segments.max() == 4
        assert float(summed_loss(Wrapped(model), *tensors(packed))) == pytest.approx(expected, rel=1e-4)
        apart = packing.pack(samples(), 64, False)
        assert float(summed_loss(Wrapped(model), *tensors(apart))) == pytest.approx(expected, rel=1e-4)


def test_only_learned_tokens_reach_the_head_and_the_loss(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "tiny"))
    ids, labels, positions, segments = tensors(packing.pack(samples(), 64, True))
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: widths.append(args[0].shape[1]))
    before = float(summed_loss(Wrapped(model), ids, labels, positions, segments).detach())
    assert widths == [int((labels >= 0).sum())]
    # The last token of a sample predicts nothing; changing what is not learned and not seen changes nothing.
    padding = segments == 0
    assert padding.any()
    after = summed_loss(Wrapped(model), ids.masked_fill(padding, 63), labels, positions, segments)
    assert float(after.detach()) == before


def test_a_model_with_state_is_refused_packed_and_right_unpacked() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    changes = {"data.pack": False}
    check_packable(model, override(RunConfig(), changes))
    with pytest.raises(FailedPrecondition, match=r"data\.pack") as caught:
        check_packable(model, RunConfig())
    assert caught.value.reason == "MODEL_NOT_TRAINABLE"
    with torch.no_grad():
        one_by_one = [packing.pack([s], 64, False) for s in samples()]
        expected = sum(float(summed_loss(Wrapped(model), *tensors(b))) for b in one_by_one)
        together = packing.pack(samples(), 64, False)
        assert float(summed_loss(Wrapped(model), *tensors(together))) == pytest.approx(expected, rel=1e-4)


def config_for(**more: Any) -> RunConfig:
    changes = {"method": "lora", "quant.bits": 0, "lora.rank": 4, "lora.dropout": 0.0, "model.dtype": "float32"}
    return override(RunConfig(), {**changes, **more})


def test_accumulation_is_exact(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    blocks = tensors(packing.pack(samples(), 64, False))
    learned = int((blocks[1] >= 0).sum())

    def gradients(batch_size: int) -> dict[str, torch.Tensor]:
        model = load_model(folder, config_for(), torch.float32)
        for name, parameter in trainable(model).items():  # B starts at 0, which would leave A without a gradient
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        for at in range(0, 4, batch_size):
            (summed_loss(model, *(t[at : at + batch_size] for t in blocks)) / learned).backward()
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        return {name: p.grad for name, p in trainable(model).items() if p.grad is not None}

    whole, halves, single = gradients(4), gradients(2), gradients(1)
    assert len(whole) == len(trainable(load_model(folder, config_for(), torch.float32)))
    for name, gradient in whole.items():
        largest = float(gradient.abs().max())
        assert largest > 0
        # Sums in another order differ by float32's rounding of their largest terms, not of a small result.
        torch.testing.assert_close(halves[name], gradient, rtol=0, atol=1e-5 * largest)
        torch.testing.assert_close(single[name], gradient, rtol=0, atol=1e-5 * largest)


def test_qlora_keeps_the_base_in_four_bits_and_lora_in_float32(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path / "tiny"), config_for(**{"quant.bits": 4}), torch.bfloat16)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.base_layer.weight.dtype == torch.uint8
    assert layer.base_layer.weight.quant_state.nested and layer.base_layer.weight.quant_state.quant_type == "nf4"
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_evaluating_leaves_a_four_bit_base_as_it_was(tmp_path: Path) -> None:
    model = load_model(tiny_model(tmp_path / "tiny"), config_for(**{"quant.bits": 4}), torch.bfloat16)
    weight = model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight
    before, scales = weight.data.clone(), weight.quant_state.absmax.clone()
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5, 9]]))
    assert torch.equal(weight.data, before) and torch.equal(weight.quant_state.absmax, scales)


def test_code_of_its_own_and_unknown_models_are_refused(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "tiny")
    good = json.loads((folder / "config.json").read_text())
    for change in ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, {"model_type": "nonsense"}):
        (folder / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(FailedPrecondition) as caught:
            load_model(folder, config_for(), torch.float32)
        assert caught.value.reason == "MODEL_NOT_TRAINABLE"
    (folder / "config.json").write_text(json.dumps(good))
    with pytest.raises(InvalidArgument, match="nosuchlayer"):
        load_model(folder, config_for(**{"lora.targets": ["nosuchlayer"]}), torch.float32)


def test_memory_running_out_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("shapes differ"))


def test_a_run_that_diverges_fails_and_says_where(file_store: Store, tmp_path: Path) -> None:
    meta = {"architecture": "LlamaForCausalLM", "template": "tokenizer", "generation": {"eos_token_id": [2]}}
    base = publish_directory(file_store, "base", tiny_model(tmp_path / "tiny"), meta=meta)
    blob = file_store.put_blob(b'{"instruction": "say", "output": "it"}\n' * 8)
    files = (File("a.jsonl", blob.digest, blob.size),)
    data = publish(file_store, Manifest("dataset", files, (), {"format": "alpaca", "rows": 8}))
    more = {"optim.lr": 1e30, "optim.clip_norm": 0.0, "schedule.accumulate": 1, "data.max_length": 64}
    run = TrainRun(
        job="workspaces/default/trainingJobs/t",
        config=config_for(**more, **{"report.prompts": ["say"], "report.sample_tokens": 4}),
        base=ArtifactRef(name="workspaces/default/models/tiny", digest=base),
        datasets=(ArtifactRef(name="workspaces/default/datasets/d/revisions/r1", digest=data),),
    )
    raise_fence(file_store, "jobs/nan", 1)
    file_store.put(f"{attempt_key('jobs/nan', 1)}/run.json", dump(to_json(run)))
    command = [sys.executable, "-m", "services.finetune", "train", run_uri(file_store.uri, "jobs/nan", 1)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 65, done.stderr
    assert "Traceback" not in done.stderr
    ended = read_outcome(file_store, "jobs/nan")
    assert ended is not None and ended[1].error is not None
    assert ended[1].error["reason"] == "LOSS_NOT_FINITE" and int(ended[1].error["metadata"]["step"]) > 1
    events = [e for _, segment in read_segments(file_store, "jobs/nan", 1, -1) for e in segment]
    assert any(e["type"] == "log" and "computing in float32" in e["text"] for e in events)
    assert next(e for e in events if e["type"] == "metric")["values"]["total_steps"] > 0
