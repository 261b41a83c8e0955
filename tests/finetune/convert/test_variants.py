"""Every kind of LoRA adapter that PEFT can merge, against PEFT itself in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from services.finetune.errors import InvalidArgument
from services.finetune.orders import ImportTask, MergeTask
from services.finetune.store import Store
from services.finetune.store.artifacts import Manifest, Parent, load, materialise, publish_directory
from tests.finetune.convert.conftest import Convert, load_whole
from tests.finetune.convert.test_merge import ref, tensors, ulps
from tests.tiny import tiny_tokenizer

BASE = "workspaces/w/models/base"


def llama(folder: Path, dtype: str = "float32", tied: bool = False) -> Path:
    torch.manual_seed(0)
    tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tied,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    """Its layers keep [in, out], and its head is tied."""
    torch.manual_seed(0)
    tiny_tokenizer(folder)
    config = GPT2Config(vocab_size=259, n_positions=512, n_embd=32, n_layer=2, n_head=2, eos_token_id=2, bos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, **options: Any) -> Path:
    """An adapter as PEFT saves it, in which nothing is zero any more."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            change = torch.randn_like(parameter) * 0.1
            parameter.data.add_(change.abs() if "magnitude" in name else change)  # in place: some are tied to others
    wrapped.save_pretrained(str(folder))
    return folder


class Made:
    """A base and an adapter in a store."""

    def __init__(self, do: Convert, store: Store, model: Path, folder: Path) -> None:
        self.do, self.store, self.model, self.folder = do, store, model, folder
        meta: dict[str, Any] = {"template": "tokenizer", "system": "", "base_name": BASE, "generation": {}}
        meta |= {"architecture": "LlamaForCausalLM", "context_length": 64, "dtype": "float32"}
        if "gpt2" in (model / "config.json").read_text():  # merged like all others, but not imported
            self.base = publish_directory(store, "base", model, meta=meta)
        else:
            self.base = do(import_model=ImportTask(local_path=str(model)))
        (folder / "README.md").unlink(missing_ok=True)
        self.adapter = publish_directory(store, "adapter", folder, [Parent("base", self.base, BASE)], meta)

    def merge(self, out: Path, **options: Any) -> tuple[Manifest, Path]:
        merged = load(self.store, self.do(merge=MergeTask(adapter=ref(self.adapter), base=ref(self.base), **options)))
        return merged, materialise(self.store, merged, out)


def on(base: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, str(folder)).eval()


def loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


COLUMN_ULPS = 8
"""In float32 PEFT adds up the lengths of whole columns in float32, we in float64: they differ in the last bits."""

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora of all": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 8},
        "alpha_pattern": {r"layers\.0\..*": 16},
    },
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head"]},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "lora on biases": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_merging_equals_peft(do: Convert, store: Store, tmp_path: Path, name: str, dtype: str) -> None:
    model = llama(tmp_path / "base", dtype)
    folder = adapter(model, tmp_path / "adapter", **VARIANTS[name])
    merged, out = Made(do, store, model, folder).merge(tmp_path / "merged")
    expected, found = on(loaded(model), folder).merge_and_unload().state_dict(), tensors(out)
    base = tensors(model)
    assert found.keys() == expected.keys() == base.keys()
    for key, value in found.items():
        assert value.dtype == getattr(torch, dtype), key
        limit = COLUMN_ULPS if name == "dora of all" and "embed" in key and dtype == "float32" else 1
        assert ulps(value, expected[key].to(value.dtype)) <= limit, key
        if torch.equal(expected[key], base[key].float()):
            assert torch.equal(value, base[key]), key
    assert any(not torch.equal(value, base[key]) for key, value in found.items())
    load_whole(out)
    report = merged.meta["report"]
    assert report.get("tokens", 0) > 100 and report["kl_nats"] <= (1e-6 if dtype == "float32" else 1e-3), report
    assert report["top1_agreement"] >= (0.99 if dtype == "float32" else 0.9), report


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("dora", [False, True])
def test_layers_that_keep_their_inputs_first(do: Convert, store: Store, tmp_path: Path, dora: bool) -> None:
    model = gpt2(tmp_path / "base")
    options = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "use_dora": dora}
    folder = adapter(model, tmp_path / "adapter", **options)
    _, out = Made(do, store, model, folder).merge(tmp_path / "merged")
    expected, found = on(loaded(model), folder).merge_and_unload().state_dict(), tensors(out)
    assert found.keys() == tensors(model).keys()
    assert max(ulps(value, expected[key]) for key, value in found.items()) <= (COLUMN_ULPS if dora else 1)
    assert load_whole(out).config.tie_word_embeddings


TIED: dict[str, dict[str, Any]] = {
    "neither": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens"]},
    "head saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both alike": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("name", TIED)
def test_a_tied_head_becomes_what_the_adapter_computes(do: Convert, store: Store, tmp_path: Path, name: str) -> None:
    model = llama(tmp_path / "base", tied=True)
    folder = adapter(model, tmp_path / "adapter", **TIED[name])
    merged, out = Made(do, store, model, folder).merge(tmp_path / "merged")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        wanted = on(loaded(model), folder)(input_ids=ids).logits
        found = load_whole(out)(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert merged.meta["report"]["kl_nats"] < 1e-6
    tied = name in ("neither", "both alike")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in tensors(out)) == (not tied)
    if tied and name == "neither":
        assert merged.file("config.json") == load(store, merged.parents[0].digest).file("config.json")


@pytest.mark.parametrize("kind", ["nf4", "nf4-single"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_a_base_as_qlora_sees_it(do: Convert, store: Store, tmp_path: Path, kind: str) -> None:
    from transformers import BitsAndBytesConfig

    model = llama(tmp_path / "base")
    folder = adapter(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    merged, out = Made(do, store, model, folder).merge(tmp_path / "merged", base_dtype=kind)
    assert merged.meta["report"]["kl_nats"] < 1e-6
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    coarse: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=quant)
    plain, found, base = loaded(model), tensors(out), tensors(model)
    layer: Any
    for name, layer in coarse.named_modules():
        if type(layer).__name__ == "Linear4bit":
            rounded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            assert not torch.equal(rounded, base[f"{name}.weight"])
            plain.get_submodule(name).weight.data = rounded
    expected = on(plain, folder).merge_and_unload().state_dict()
    assert max(ulps(value, expected[key]) for key, value in found.items()) <= 1
    untouched = [k for k in found if "q_proj.weight" not in k and "down_proj.weight" not in k]
    assert all(torch.equal(found[k], expected[k]) for k in untouched)
    assert torch.equal(found["lm_head.weight"], base["lm_head.weight"])


def test_rounded_rows_do_not_depend_on_slices(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    from services.finetune.convert import nf4
    from services.finetune.convert.stream import read_model

    weight = torch.randn(37, 50, generator=torch.Generator().manual_seed(3))  # blocks cross rows, and the last is short
    save_file({"w": weight}, tmp_path / "model.safetensors")
    manifest = load(store, publish_directory(store, "base", tmp_path))
    code, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected = bnb.dequantize_4bit(code, state)
    monkeypatch.setattr(nf4, "_SLICE", 64)
    rounded = nf4.Rounded(store, read_model(store, manifest)[0], double=True)
    assert torch.equal(torch.cat([rounded.rows(n, min(n + 3, 37)) for n in range(0, 37, 3)]), expected)


@pytest.mark.parametrize(
    ("change", "reason", "words"),
    [
        ({"use_qalora": True}, "ADAPTER_UNSUPPORTED", "use_qalora"),
        ({"init_lora_weights": "pissa"}, "ADAPTER_UNSUPPORTED", "pissa"),
        ({"peft_type": "IA3"}, "ADAPTER_UNSUPPORTED", "IA3"),
        ({"r": 5}, "ADAPTER_INCOMPLETE", "has rank 4, its config says 5"),
        ({"use_dora": True}, "ADAPTER_INCOMPLETE", "lengths of rows"),
        ({"rank_pattern": {"(": 3}}, "ADAPTER_UNSUPPORTED", "no regular expression"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(
    do: Convert, store: Store, tmp_path: Path, change: dict[str, Any], reason: str, words: str
) -> None:
    model = llama(tmp_path / "base")
    folder = adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InvalidArgument) as caught:
        Made(do, store, model, folder).merge(tmp_path / "merged")
    assert caught.value.reason == reason and words in caught.value.message


def test_half_a_pair_is_refused(do: Convert, store: Store, tmp_path: Path) -> None:
    model = llama(tmp_path / "base")
    folder = adapter(model, tmp_path / "adapter", target_modules=["q_proj"])
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(k for k in sorted(weights) if ".lora_B." in k)
    del weights[name]
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(InvalidArgument) as caught:
        Made(do, store, model, folder).merge(tmp_path / "merged")
    assert caught.value.reason == "ADAPTER_INCOMPLETE"
