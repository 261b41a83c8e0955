from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from services.finetune.errors import Cancelled, FailedPrecondition, InvalidArgument, NotFound
from services.finetune.orders import ArtifactRef, ImportTask
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise, publish_directory, read_file
from tests.finetune.convert.conftest import Convert, load_whole


def copy(source: Path, to: Path, leave_out: str = "-") -> Path:
    return Path(shutil.copytree(source, to, ignore=shutil.ignore_patterns(leave_out)))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_folder_keeps_its_bytes_and_describes_itself(do: Convert, store: Store, llama: Path) -> None:
    made = load(store, do(import_model=ImportTask(local_path=str(llama))))
    assert made.kind == "base" and made.parents == ()
    assert read_file(store, made, "model.safetensors") == (llama / "model.safetensors").read_bytes()
    numbers = sum(v.numel() for v in load_file(llama / "model.safetensors").values())
    assert made.meta == {
        "architecture": "LlamaForCausalLM",
        "template": "tokenizer",
        "system": "",
        "generation": {"eos_token_id": [2]},
        "dtype": "float32",
        "context_length": 512,
        "parameters": numbers,
    }


def test_a_cast_model_is_rounded_once_and_its_source_untouched(
    do: Convert, store: Store, llama: Path, tmp_path: Path
) -> None:
    before = (llama / "model.safetensors").read_bytes()
    made = load(store, do(import_model=ImportTask(local_path=str(llama), dtype="bfloat16", template="internlm2_chat")))
    assert (llama / "model.safetensors").read_bytes() == before
    folder = materialise(store, made, tmp_path / "out")
    original = load_file(llama / "model.safetensors")
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value, original[name].bfloat16()), name
    assert made.meta["dtype"] == "bfloat16" and made.meta["template"] == "internlm2_chat"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    load_whole(folder)


def test_an_uploaded_revision_is_a_source(do: Convert, store: Store, llama: Path) -> None:
    source = publish_directory(store, "dataset", llama)
    made = load(store, do(import_model=ImportTask(source=ArtifactRef(name="d", digest=source))))
    assert [(p.role, p.digest) for p in made.parents] == [("source", source)]


def test_code_and_pickles_are_left_out_where_safetensors_are(
    do: Convert, store: Store, llama: Path, tmp_path: Path
) -> None:
    source = copy(llama, tmp_path / "m")
    for name in ("modeling_evil.py", "pytorch_model.bin", "run.sh"):
        (source / name).write_text("evil")
    paths = {f.path for f in load(store, do(import_model=ImportTask(local_path=str(source)))).files}
    assert not paths & {"modeling_evil.py", "pytorch_model.bin", "run.sh"}


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("deep", [False, True])
def test_remote_code_is_refused(do: Convert, llama: Path, tmp_path: Path, name: str, deep: bool) -> None:
    source = copy(llama, tmp_path / "m")
    wish = {"auto_map": {"AutoModel": "evil.Model"}}
    edit(source / name, **({"inner": wish} if deep else wish))
    with pytest.raises(FailedPrecondition) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == "REMOTE_CODE_REFUSED" and name in caught.value.message


@pytest.mark.parametrize("shards", [1, 2])
def test_a_pickle_of_tensors_becomes_safetensors(
    do: Convert, store: Store, llama: Path, tmp_path: Path, shards: int
) -> None:
    source = copy(llama, tmp_path / "m", "*.safetensors")
    tensors = load_file(llama / "model.safetensors")
    names = sorted(tensors)
    for n in range(shards):
        part = {k: tensors[k] for k in names[n::shards]}
        torch.save(part, source / f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin")
    torch.save({"lr": 1}, source / "training_args.bin")
    folder = materialise(store, load(store, do(import_model=ImportTask(local_path=str(source)))), tmp_path / "out")
    found = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], v) for k, v in tensors.items())
    load_whole(folder)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_a_malicious_pickle_is_not_executed(do: Convert, llama: Path, tmp_path: Path, name: str, legacy: bool) -> None:
    source, canary = copy(llama, tmp_path / "m", "*.safetensors"), tmp_path / "canary"
    if legacy:
        (source / name).write_bytes(pickle.dumps({"x": Canary(canary)}))
    else:
        torch.save({"x": Canary(canary)}, source / name)
    with pytest.raises(InvalidArgument) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == "PICKLE_REFUSED" and not canary.exists()
    torch.load(source / name, weights_only=False) if not legacy else pickle.loads((source / name).read_bytes())
    assert canary.exists(), "the canary itself must work"


@pytest.mark.parametrize("content", [{"x": 1}, {"x": torch.zeros(2).to_sparse()}, [torch.zeros(2)]])
def test_a_pickle_of_other_things_is_refused(do: Convert, llama: Path, tmp_path: Path, content: Any) -> None:
    source = copy(llama, tmp_path / "m", "*.safetensors")
    torch.save(content, source / "pytorch_model.bin")
    with pytest.raises(InvalidArgument) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == "PICKLE_REFUSED"


def test_a_slow_tokenizer_gets_its_tokenizer_json(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    import sentencepiece

    source = copy(llama, tmp_path / "m", "tokenizer.json")
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(source / "tokenizer"), vocab_size=60, model_type="bpe",
        byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    edit(source / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **special)
    made = load(store, do(import_model=ImportTask(local_path=str(source))))
    folder = materialise(store, made, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    text = "the lazy fox"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def broken(source: Path, what: str) -> None:
    if what == "weights cut off":
        data = (source / "model.safetensors").read_bytes()
        (source / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif what == "index names a file outside":
        index = {"weight_map": {"x": "../model.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "index lacks a tensor":
        index = {"weight_map": {"x": "model.safetensors"}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "config is no JSON":
        (source / "config.json").write_text("{")
    elif what == "tokenizer is no JSON":
        (source / "tokenizer.json").write_text("{")
    elif what == "no config":
        (source / "config.json").unlink()
    elif what == "no weights":
        (source / "model.safetensors").unlink()
    elif what == "quantised":
        edit(source / "config.json", quantization_config={"quant_method": "gptq"})
    elif what == "integers":
        save_file({"x": torch.zeros(2, dtype=torch.int8)}, source / "model.safetensors")
    elif what == "not causal":
        edit(source / "config.json", model_type="bert", architectures=["BertModel"])
    elif what == "unknown architecture":
        edit(source / "config.json", architectures=["EvilForCausalLM"])


@pytest.mark.parametrize(
    ("what", "error", "reason"),
    [
        ("weights cut off", InvalidArgument, "WEIGHTS_MALFORMED"),
        ("index names a file outside", InvalidArgument, "WEIGHTS_INCOMPLETE"),
        ("index lacks a tensor", InvalidArgument, "WEIGHTS_INCOMPLETE"),
        ("config is no JSON", InvalidArgument, "CONFIG_MALFORMED"),
        ("tokenizer is no JSON", FailedPrecondition, "TOKENIZER_INVALID"),
        ("no config", InvalidArgument, "MODEL_UNSUPPORTED"),
        ("no weights", InvalidArgument, "MODEL_UNSUPPORTED"),
        ("quantised", FailedPrecondition, "MODEL_UNSUPPORTED"),
        ("integers", FailedPrecondition, "MODEL_UNSUPPORTED"),
        ("not causal", FailedPrecondition, "MODEL_UNSUPPORTED"),
        ("unknown architecture", FailedPrecondition, "MODEL_UNSUPPORTED"),
    ],
)
def test_what_is_wrong_is_said(
    do: Convert, llama: Path, tmp_path: Path, what: str, error: type[Exception], reason: str
) -> None:
    source = copy(llama, tmp_path / "m")
    broken(source, what)
    with pytest.raises(error) as caught:
        do(import_model=ImportTask(local_path=str(source)))
    assert caught.value.reason == reason  # type: ignore[attr-defined]


def test_templates_and_paths_are_checked(do: Convert, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as unknown:
        do(import_model=ImportTask(local_path=str(llama), template="chatml2"))
    assert unknown.value.reason == "TEMPLATE_UNKNOWN" and "chatml" in unknown.value.message
    bare = copy(llama, tmp_path / "m", "chat_template.jinja")
    with pytest.raises(FailedPrecondition) as missing:
        do(import_model=ImportTask(local_path=str(bare), template="tokenizer"))
    assert missing.value.reason == "TEMPLATE_MISSING"
    with pytest.raises(NotFound):
        do(import_model=ImportTask(local_path=str(tmp_path / "nowhere")))


def test_stop_keeps_nothing(do: Convert, store: Store, llama: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Cancelled):
        do(stop, import_model=ImportTask(local_path=str(llama), dtype="bfloat16"))
    assert not store.list("manifests/")
