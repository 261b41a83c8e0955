"""Families that came with code of their own give, as native models, the logits of their original definitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.orders import ImportTask
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise
from tests.finetune.convert.conftest import Convert, load_whole
from tests.finetune.convert.families import CONFIGS, FORWARDS, VOCAB, random_weights, write_family
from tests.tiny import tiny_tokenizer

NATIVE = {
    "internlm": "LlamaForCausalLM", "internlm2": "LlamaForCausalLM", "internlm3": "LlamaForCausalLM",
    "baichuan": "LlamaForCausalLM", "baichuan2": "LlamaForCausalLM", "yi": "LlamaForCausalLM",
    "qwen": "Qwen2ForCausalLM", "chatglm": "GlmForCausalLM",
}  # fmt: skip
BEYOND = {"internlm", "internlm2", "internlm3"}
"""Their dynamic NTK is native too, so they are equal also past the length of training."""


def family_folder(name: str, folder: Path, pickled: bool = False, **changes: Any) -> tuple[Path, dict[str, Any]]:
    weights = random_weights(name)
    write_family(name, tiny_tokenizer(folder), weights, pickled)
    config = {**CONFIGS[name], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_whole(folder).eval()(ids[None]).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_native_logits_are_the_originals(do: Convert, store: Store, tmp_path: Path, name: str, pickled: bool) -> None:
    source, weights = family_folder(name, tmp_path / "m", pickled)
    made = load(store, do(import_model=ImportTask(local_path=str(source))))
    folder = materialise(store, made, tmp_path / "out")
    assert made.meta["architecture"] == NATIVE[name] and "auto_map" not in (folder / "config.json").read_text()
    assert made.meta["context_length"] == 64
    for length in (24, 100) if name in BEYOND else (24, 64):
        ids = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length))
        expected = FORWARDS[name](weights, CONFIGS[name], ids)
        assert expected.abs().max() > 1
        torch.testing.assert_close(logits(folder, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["internlm2", "baichuan2"])
def test_a_cast_rounds_once(do: Convert, store: Store, tmp_path: Path, name: str) -> None:
    source, _ = family_folder(name, tmp_path / "m")
    whole = materialise(store, load(store, do(import_model=ImportTask(local_path=str(source)))), tmp_path / "whole")
    half = do(import_model=ImportTask(local_path=str(source), dtype="bfloat16"))
    found = load_file(materialise(store, load(store, half), tmp_path / "half") / "model.safetensors")
    for key, value in load_file(whole / "model.safetensors").items():
        assert torch.equal(found[key], value.bfloat16()), key


def test_the_family_brings_its_template(do: Convert, store: Store, tmp_path: Path) -> None:
    source, _ = family_folder("internlm", tmp_path / "m")
    (source / "chat_template.jinja").unlink()
    made = load(store, do(import_model=ImportTask(local_path=str(source))))
    assert made.meta["template"] == "internlm_chat"
    asked = load(store, do(import_model=ImportTask(local_path=str(source), template="chatml")))
    assert asked.meta["template"] == "chatml"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("baichuan2", {"max_position_embeddings": None, "model_max_length": 4096}, "ALiBi"),
        ("qwen", {"kv_channels": 16}, "kv_channels"),
        ("qwen", {"no_bias": False}, "no_bias"),
        ("chatglm", {"rope_ratio": 50}, "rope_ratio"),
        ("chatglm", {"add_bias_linear": True}, "add_bias_linear"),
        ("internlm2", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ("internlm2", {"num_attention_heads": "four"}, "config.json"),
        ("internlm3", {"qkv_bias": True}, "qkv_bias"),
        ("qwen", {"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    ],
)
def test_what_has_no_native_equal_is_refused(
    do: Convert, tmp_path: Path, name: str, changes: dict[str, Any], said: str
) -> None:
    source, _ = family_folder(name, tmp_path / "m", **changes)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(FailedPrecondition) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == "MODEL_UNSUPPORTED" and said in caught.value.message


@pytest.mark.parametrize("what", ["missing", "unknown", "another shape"])
def test_a_tensor_that_does_not_fit_is_named(do: Convert, tmp_path: Path, what: str) -> None:
    source, weights = family_folder("internlm2", tmp_path / "m")
    name = "model.layers.1.attention.wqkv.weight"
    if what == "missing":
        del weights[name]
    elif what == "unknown":
        weights["model.layers.1.attention.extra.weight"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(16, 32)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(InvalidArgument) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == "WEIGHTS_INCOMPLETE"
    assert ("layers.1.self_attn" if what != "unknown" else "extra") in caught.value.message


NATIVES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "zephyr": {"model_type": "mistral", "sliding_window": None},
    "yi": {"model_type": "llama", "rope_theta": 5_000_000.0},
    "starcoder": {"model_type": "gpt_bigcode", "multi_query": True, "n_positions": 64},
}


# transformers' gpt_bigcode is scripted when it is imported.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", NATIVES)
def test_native_families_come_as_they_are(do: Convert, store: Store, tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": VOCAB}  # fmt: skip
    if name == "starcoder":
        sizes = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
    given: dict[str, Any] = {**sizes, **NATIVES[name], "bos_token_id": 1, "eos_token_id": 2}
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given)).eval()
    model.save_pretrained(tiny_tokenizer(tmp_path / "m"))
    made = load(store, do(import_model=ImportTask(local_path=str(tmp_path / "m"))))
    ids = torch.arange(20)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    assert torch.equal(logits(materialise(store, made, tmp_path / "out"), ids), expected)
