from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.finetune.convert.shards import read_folder
from services.finetune.errors import Cancelled, FailedPrecondition, InvalidArgument
from services.finetune.orders import AdapterTask, ArtifactRef, ImportTask, MergeTask
from services.finetune.store import Store
from services.finetune.store.artifacts import Manifest, Parent, load, materialise, publish_directory
from services.finetune.tokenizer import Tokenizer
from tests.finetune.convert.conftest import Convert, load_whole
from tests.tiny import tiny_model


def ref(digest: str, name: str = "workspaces/w/models/m") -> ArtifactRef:
    return ArtifactRef(name=name, digest=digest)


def lora(base: Path, folder: Path, **options: Any) -> Path:
    """A LoRA whose B is not zero, as PEFT saves it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options})
    wrapped = peft.get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(str(folder))
    return folder


def checkpoint(store: Store, folder: Path, base: str, template: str = "tokenizer") -> str:
    """The artifact that training publishes."""
    meta = {"step": 1, "loss": 1.0, "template": template, "method": "lora", "base_name": "workspaces/w/models/base"}
    meta |= {"architecture": "LlamaForCausalLM", "system": "Be kind."}
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "state.json").write_text("{}")
    parents = [Parent("base", base, "workspaces/w/models/base"), Parent("dataset", "sha256:" + "0" * 64, "d")]
    return publish_directory(store, "checkpoint", folder, parents, meta)


class Made:
    """Base, adapter and merged model, made as a user does."""

    def __init__(self, do: Convert, store: Store, model: Path, tmp: Path, template: str = "tokenizer", **options: Any):
        self.do, self.store, self.tmp, self.model = do, store, tmp, model
        self.lora = lora(model, tmp / "lora", **options)
        self.base = do(import_model=ImportTask(local_path=str(model)))
        self.checkpoint = checkpoint(store, self.lora, self.base, template)
        self.adapter = do(adapter=AdapterTask(checkpoint=ref(self.checkpoint)))

    def merge(self, stop: threading.Event | None = None, **options: Any) -> Path:
        task = MergeTask(adapter=ref(self.adapter), base=ref(self.base), **options)
        self.merged = load(self.store, self.do(stop, merge=task))
        return materialise(self.store, self.merged, self.tmp / "merged")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    whole: Any = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return dict(whole.state_dict())


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many representable numbers lie between, at most."""
    whole = {2: torch.int16, 4: torch.int32}[a.element_size()]
    lowest = torch.iinfo(whole).min

    def line(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(whole).long()
        return torch.where(bits < 0, lowest - bits, bits)

    return int((line(a) - line(b)).abs().max())


@pytest.mark.parametrize("dtype", ["", "bfloat16", "float16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_merging_equals_peft(do: Convert, store: Store, llama: Path, tmp_path: Path, dtype: str, rslora: bool) -> None:
    made = Made(do, store, llama, tmp_path, use_rslora=rslora)
    found, expected, base = tensors(made.merge(dtype=dtype)), peft_merged(llama, made.lora), tensors(llama)
    assert found.keys() == base.keys()
    for name, value in found.items():
        assert value.dtype == (getattr(torch, dtype) if dtype else torch.float32)
        assert ulps(value, expected[name].to(value.dtype)) <= 1, name
        touched = "q_proj" in name or "down_proj" in name
        assert torch.equal(value, base[name].to(value.dtype)) != touched, name


def test_the_result_is_described_and_loads_in_stock_transformers(
    do: Convert, store: Store, llama: Path, tmp_path: Path
) -> None:
    made = Made(do, store, llama, tmp_path, template="internlm2_chat")
    folder = made.merge(dtype="bfloat16")
    assert made.merged.kind == "merged" and made.merged.meta["dtype"] == "bfloat16"
    assert made.merged.meta["template"] == "internlm2_chat" and made.merged.meta["system"] == "Be kind."
    assert made.merged.meta["base_name"] == "workspaces/w/models/base"
    assert [(p.role, p.digest) for p in made.merged.parents] == [("base", made.base), ("adapter", made.adapter)]
    assert load_whole(folder).dtype == torch.bfloat16
    from services.finetune.formats import Message
    from services.finetune.templates import load_template, to_prompt_ids

    tokenizer = Tokenizer.from_files(folder)
    ours = to_prompt_ids(load_template("internlm2_chat", tokenizer), tokenizer, [Message("user", "Hello")])
    stock = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Hello"}]
    assert stock.apply_chat_template(chat, tokenize=True, return_dict=False, add_generation_prompt=True) == ours


def test_shards_keep_their_limit(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    made = Made(do, store, llama, tmp_path)
    limit = 20_000  # less than the embedding, 259 * 32 * 4 bytes
    folder = made.merge(max_shard_size_bytes=limit)
    files = sorted(folder.glob("*.safetensors"))
    assert [f.name for f in files] == [
        f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    above = [f for f in files if f.stat().st_size > limit]
    assert len(above) == 2 and all(len(load_file(f)) == 1 for f in above)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors(folder).values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "pt") as content:
            assert name in content.keys()  # noqa: SIM118  # no mapping
    load_whole(folder)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert {t.name for t in read_folder(folder)} == set(tensors(llama))


def test_numbers_of_several_widths_share_a_file(tmp_path: Path) -> None:
    from services.finetune.convert.shards import plan, raw, write

    mixed = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(1, dtype=torch.int8), "c": torch.tensor(2.0)}
    save_file(mixed, tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", plan(read_folder(tmp_path), 10**6), raw, lambda t: None)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == mixed.keys() and all(torch.equal(found[k], v) for k, v in mixed.items())


def test_an_adapter_describes_itself(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    made = Made(do, store, llama, tmp_path)
    adapter, base = load(store, made.adapter), load(store, made.base)
    assert adapter.kind == "adapter" and adapter.file("tokenizer.json") == base.file("tokenizer.json")
    assert [p.role for p in adapter.parents] == ["base", "dataset", "checkpoint"]
    assert adapter.meta["template"] == "tokenizer" and adapter.meta["generation"] == {"eos_token_id": [2]}
    folder = materialise(store, adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "workspaces/w/models/base"
    half = load(store, do(adapter=AdapterTask(checkpoint=ref(made.checkpoint), dtype="bfloat16")))
    weights = load_file(materialise(store, half, tmp_path / "half") / "adapter_model.safetensors")
    assert {v.dtype for v in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("what", ["half missing", "module missing", "wrong shape", "nothing"])
def test_an_incomplete_checkpoint_is_refused(do: Convert, store: Store, llama: Path, tmp_path: Path, what: str) -> None:
    folder = lora(llama, tmp_path / "lora")
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(k for k in sorted(weights) if ".lora_A." in k)
    if what == "half missing":
        del weights[name]
    elif what == "module missing":
        del weights[name], weights[name.replace("lora_A", "lora_B")]
    elif what == "wrong shape":
        weights[name] = torch.zeros(4, 5)
    else:
        weights.clear()
    save_file(weights, folder / "adapter_model.safetensors")
    made = checkpoint(store, folder, do(import_model=ImportTask(local_path=str(llama))))
    with pytest.raises(InvalidArgument) as caught:
        do(adapter=AdapterTask(checkpoint=ref(made)))
    assert caught.value.reason == "ADAPTER_INCOMPLETE"


def test_another_base_is_refused(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    made = Made(do, store, llama, tmp_path)
    made.base = do(import_model=ImportTask(local_path=str(tiny_model(tmp_path / "other", seed=7))))
    with pytest.raises(FailedPrecondition) as caught:
        made.merge()
    assert caught.value.reason == "BASE_MISMATCH"


def forged(store: Store, made: Made, weights: dict[str, torch.Tensor], tmp: Path) -> str:
    adapter = load(store, made.adapter)
    folder = tmp / "forged"
    folder.mkdir()
    for f in adapter.files:
        (folder / f.path).write_bytes(b"".join(store.read_blob(f.digest)))
    save_file(weights, folder / "adapter_model.safetensors")
    return publish_directory(store, "adapter", folder, adapter.parents, adapter.meta)


def test_a_tensor_without_a_base_weight_is_named(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    made = Made(do, store, llama, tmp_path)
    weights = load_file(made.lora / "adapter_model.safetensors")
    extra = "base_model.model.model.layers.9.self_attn.q_proj.lora_{}.weight"
    weights |= {extra.format("A"): torch.zeros(4, 32), extra.format("B"): torch.zeros(32, 4)}
    made.adapter = forged(store, made, weights, tmp_path)
    with pytest.raises(InvalidArgument) as caught:
        made.merge()
    assert caught.value.reason == "ADAPTER_MISMATCH" and extra.format("A") in caught.value.message


def test_merging_stops_between_tensors(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    made = Made(do, store, llama, tmp_path)
    stop = threading.Event()
    stop.set()
    before: list[Any] = store.list("manifests/")
    with pytest.raises(Cancelled) as caught:
        made.merge(stop)
    assert caught.value.reason == "STOPPED" and store.list("manifests/") == before


def test_bytes_are_reported(do: Convert, store: Store, llama: Path, tmp_path: Path) -> None:
    made = Made(do, store, llama, tmp_path)
    made.merge()
    from services.finetune.progress import read_segments

    events = [e for _, part in read_segments(store, "jobs/j3", 1, -1) for e in part if e["type"] == "progress"]
    assert isinstance(made.merged, Manifest)
    total = sum(v.nbytes for v in tensors(llama).values())
    assert events[0]["done_bytes"] == 0 and events[-1]["done_bytes"] == total == events[-1]["total_bytes"]


def test_the_report_is_made_as_asked_for(
    do: Convert, store: Store, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(do, store, llama, tmp_path)
    monkeypatch.setattr("services.finetune.convert.merge_report.LIMIT_PARAMETERS", 1)
    for wish, why in (("", "more than 0"), ("never", "not asked for"), ("always", None)):
        task = MergeTask(adapter=ref(made.adapter), base=ref(made.base), report=wish)  # type: ignore[arg-type]
        report = load(store, do(merge=task)).meta["report"]
        assert (why in report["not_measured"]) if why else report["tokens"] > 100, report


def test_a_job_can_be_stopped_while_it_is_measured(
    do: Convert, store: Store, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, stop = Made(do, store, llama, tmp_path), threading.Event()
    monkeypatch.setattr("services.finetune.convert.merge_report._give_back", stop.set)  # as the report begins
    with pytest.raises(Cancelled):
        do(stop, merge=MergeTask(adapter=ref(made.adapter), base=ref(made.base)))
