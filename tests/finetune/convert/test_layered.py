"""Answers of a model that is read part by part, against the same model loaded whole by transformers and PEFT."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from services.finetune.convert.layered import Layered, Source
from services.finetune.convert.merge_report import LIMIT_PARAMETERS, report
from services.finetune.convert.shards import Stored, as_torch, read_file_header, read_folder

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False, "pad_token_id": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gemma2": SMALL | {"tie_word_embeddings": True, "sliding_window": 4, "query_pre_attn_scalar": 8},
    "qwen3": SMALL,
    "glm": SMALL,
    "phi3": SMALL | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_bigcode": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2},
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mixtral": SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": SMALL
    | {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "head_dim": 8,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}  # fmt: skip
ROWS = [[5, 9, 33, 12, 7, 1, 60], [4, 3], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30]]


def saved(folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random model in which nothing is zero or one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]), dtype=dtype)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.add_(torch.randn(value.shape, dtype=value.dtype), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def source(folder: Path) -> Source:
    return read_folder(folder), as_torch


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def answers(model: Any) -> torch.Tensor:
    """Row by row, as nothing is filled up."""
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore:.torch.jit.script:DeprecationWarning"
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_read_part_by_part_answers_alike(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path, kind)
    found = Layered(config(folder), source(folder)).logits(ROWS)
    torch.testing.assert_close(found, answers(whole(folder)), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::RuntimeWarning", "ignore:.torch.jit.script:DeprecationWarning"
)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral", "phi3"])
def test_and_so_does_one_with_an_adapter_on(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path / "base", kind)
    options: dict[str, Any] = {
        "target_modules": "all-linear",
        "use_dora": kind == "llama",
        "fan_in_fan_out": kind == "gpt2",
    }
    wrapped = peft.get_peft_model(whole(folder), peft.LoraConfig(r=4, lora_alpha=8, **options))
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    wrapped.save_pretrained(str(tmp_path / "lora"))
    wanted = answers(peft.PeftModel.from_pretrained(whole(folder), str(tmp_path / "lora")).eval())
    tensors = read_file_header(tmp_path / "lora/adapter_model.safetensors")
    about = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    model = Layered(config(folder), source(folder), (about, tensors, as_torch))
    torch.testing.assert_close(model.logits(ROWS), wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, answers(whole(folder)), atol=1e-2)


def test_no_more_than_one_part_is_held(tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama")
    held = list[int]()
    model = Layered(config(folder), source(folder), tell=lambda count: held.append(_real(model)))
    model.logits(ROWS)
    assert held == [0] * (3 + 3) and _real(model) == 0  # embeddings, layers, norm, head
    sizes = [t.count for t in read_folder(folder) if t.name.startswith("model.layers.0.")]
    assert model.largest_bytes == 4 * sum(sizes)


def _real(model: Layered) -> int:
    return sum(p.numel() for p in model._model.parameters() if not p.is_meta)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_missing_or_wrong_tensor_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "base", "llama")
    tensors, read = source(folder)
    gone = [t for t in tensors if t.name != "model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        Layered(config(folder), (gone, read)).logits(ROWS)
    with pytest.raises(ValueError, match=r"model\.norm\.weight does not fit"):
        Layered({**config(folder), "hidden_size": 64}, (tensors, read))._loader.load(["model.norm.weight"])
    peft.get_peft_model(whole(folder), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "lora")
    )
    about = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    path = tmp_path / "lora/adapter_model.safetensors"
    held = {t.name: as_torch(t) for t in read_file_header(path)}
    name, value = held.popitem()
    for odd, why in (
        ({**held}, "the adapter has nothing for"),
        ({**held, name: value, "x.y": value.clone()}, "has no place"),
    ):
        save_file(odd, path)
        with pytest.raises(ValueError, match=why):
            Layered(config(folder), source(folder), (about, read_file_header(path), as_torch))


@pytest.mark.parametrize(
    ("wish", "count", "why"),
    [
        ("never", 1, "not asked for"),
        ("", LIMIT_PARAMETERS + 1, "9.0 billion parameters are more than 9; `always` asks for it"),
        ("", LIMIT_PARAMETERS, "it is too odd"),
        ("always", LIMIT_PARAMETERS + 1, "it is too odd"),
    ],
)
def test_large_models_are_measured_on_demand(wish: str, count: int, why: str) -> None:
    def tokenizer() -> Any:
        raise ValueError("it is too odd")

    base: Source = ([Stored("w", "BF16", (count,), 0, 2 * count)], as_torch)
    ask = functools.partial(report, wish, ({}, {}), {}, tokenizer, {}, base, ([], as_torch))
    found = ask((lambda: [], as_torch), lambda count: None)
    assert why in found["not_measured"]
