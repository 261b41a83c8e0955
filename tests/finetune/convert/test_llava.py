"""Adapters of a LLaVA model: converted, merged, compared with PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.orders import AdapterTask, MergeTask, QuantizeTask
from services.finetune.store import Store
from services.finetune.store.artifacts import Manifest, Parent, load, materialise, publish_directory
from tests.finetune.convert import towers
from tests.finetune.convert.conftest import Convert
from tests.finetune.convert.test_assemble import load_llava, pixels
from tests.finetune.convert.test_merge import tensors, ulps
from tests.finetune.convert.towers import assembled, ref
from tests.tiny import tiny_model

NONE = "dummy-target-modules"
"""PEFT's name for no targets."""
ALL: dict[str, Any] = {
    "target_modules": r"(model\.language_model|model\.vision_tower)\..*(q_proj|v_proj|down_proj|fc1)",
    "rank_pattern": {r"vision_tower\..*": 2},
    "alpha_pattern": {r"vision_tower\..*": 3},
    "modules_to_save": ["multi_modal_projector"],
}


class Model:
    """An assembled base, with bfloat16 or float32 weights, tied or not."""

    def __init__(self, do: Convert, store: Store, tmp: Path, tied: bool, dtype: str) -> None:
        language = tiny_model(tmp / "language")
        config = LlamaConfig.from_pretrained(language, tie_word_embeddings=tied)
        LlamaForCausalLM(config).save_pretrained(language)
        self.do, self.store, self.tmp = do, store, tmp
        self.digest = assembled(do, language, towers.clip(tmp / "tower"), dtype=dtype)
        self.manifest = load(store, self.digest)
        self.folder = materialise(store, self.manifest, tmp / "base")

    def trained(self, name: str = "lora", **options: Any) -> Path:
        """What training leaves: an adapter that changes all it can, as PEFT saves it."""
        torch.manual_seed(1)
        model = LlavaForConditionalGeneration.from_pretrained(self.folder, dtype=torch.float32)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
        for place, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_A" not in place:
                parameter.data += 0.1 * torch.randn_like(parameter)
        folder = self.tmp / name
        wrapped.save_pretrained(str(folder))
        return folder

    def adapter(self, folder: Path) -> str:
        meta = {"step": 1, "loss": 1.0, "template": "tokenizer", "method": "lora", "base_name": "workspaces/w/models/b"}
        meta |= {"architecture": "LlavaForConditionalGeneration", "system": ""}
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "state.json").write_text("{}")
        made = publish_directory(self.store, "checkpoint", folder, [Parent("base", self.digest, "b")], meta)
        return self.do(adapter=AdapterTask(checkpoint=ref(made)))

    def merged(self, adapter: str, **options: Any) -> tuple[Manifest, Path]:
        made = load(self.store, self.do(merge=MergeTask(adapter=ref(adapter), base=ref(self.digest), **options)))
        return made, materialise(self.store, made, self.tmp / made.files[0].digest[7:15])

    def on(self, adapter: Path, dtype: torch.dtype) -> Any:
        """Base with the adapter on, by PEFT."""
        model: Any = LlavaForConditionalGeneration.from_pretrained(self.folder, dtype=dtype)
        return peft.PeftModel.from_pretrained(model, adapter).eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        token = json.loads((self.folder / "config.json").read_text())["image_token_index"]
        return {"input_ids": torch.tensor([[1, 5, *[token] * 4, 7, 8, 9]]), "pixel_values": pixels()}


@pytest.fixture
def model(do: Convert, store: Store, tmp_path: Path, request: pytest.FixtureRequest) -> Model:
    tied, dtype = getattr(request, "param", (False, "float32"))
    return Model(do, store, tmp_path, tied, dtype)


@pytest.mark.parametrize("model", [(True, "float32"), (False, "float32")], indirect=True, ids=["tied", "untied"])
def test_merging_all_parts_equals_peft(model: Model) -> None:
    lora = model.trained(**ALL)
    digest = model.adapter(lora)
    made, folder = model.merged(digest)
    expected: Any = model.on(lora, torch.float32)
    with torch.inference_mode():
        on = expected(**model.inputs()).logits
        off = load_llava(folder)(**model.inputs()).logits
    assert torch.allclose(on, off, atol=1e-5)
    state = expected.merge_and_unload().state_dict()
    base, found = tensors(model.folder), tensors(folder)
    assert found.keys() == base.keys()
    for name, value in load_llava(folder).state_dict().items():
        assert ulps(value, state[name]) <= 2, name
    changed = {n.split(".")[0] for n, v in found.items() if not torch.equal(v, base[n])}
    assert changed == {"language_model", "vision_tower", "multi_modal_projector"}
    assert made.meta["report"]["kl_nats_max"] < 1e-4 and made.meta["report"]["top1_agreement"] == 1.0


@pytest.mark.parametrize("model", [(True, "bfloat16")], indirect=True)
def test_in_bfloat16_the_merged_model_is_within_rounding(model: Model) -> None:
    """Its weights are the sum, rounded once; computed in float32 its answers differ by no more than that rounding."""
    lora = model.trained(**ALL)
    made, folder = model.merged(model.adapter(lora))
    exact: Any = model.on(lora, torch.float32).merge_and_unload()
    for name, value in LlavaForConditionalGeneration.from_pretrained(folder).state_dict().items():
        assert ulps(value, exact.state_dict()[name].bfloat16()) <= 1, name
    assert made.meta["report"]["top1_agreement"] > 0.9


def test_of_a_projector_alone_all_else_is_shared(model: Model) -> None:
    lora = model.trained(target_modules=NONE, modules_to_save=["multi_modal_projector"])
    made, folder = model.merged(model.adapter(lora))
    before = {f.path: f.digest for f in model.manifest.files}
    differs = [f.path for f in made.files if f.digest != before[f.path]]
    assert differs == ["model-00003-of-00003.safetensors"]
    trained = load_file(lora / "adapter_model.safetensors")
    assert len(trained) == 4
    for name, value in load_file(folder / differs[0]).items():
        assert torch.equal(value, trained[f"base_model.model.model.{name}"])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_a_tied_head_that_is_trained_becomes_its_own(do: Convert, store: Store, tmp_path: Path) -> None:
    model = Model(do, store, tmp_path, True, "float32")
    lora = model.trained(target_modules=["q_proj"], modules_to_save=["lm_head"])
    _, folder = model.merged(model.adapter(lora))
    assert json.loads((folder / "config.json").read_text())["text_config"]["tie_word_embeddings"] is False
    assert "language_model.lm_head.weight" in tensors(folder)
    with torch.inference_mode():
        on, off = model.on(lora, torch.float32)(**model.inputs()).logits, load_llava(folder)(**model.inputs()).logits
    assert torch.allclose(on, off, atol=1e-5)


def test_adapters_of_older_versions_name_modules_otherwise(model: Model) -> None:
    lora = model.trained(**ALL)
    path = lora / "adapter_model.safetensors"
    _, new = model.merged(model.adapter(lora))

    def old(name: str) -> str:
        name = name.replace("model.model.language_model.", "model.language_model.model.")
        return name.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")

    state = {old(k).replace("model.model.multi", "model.multi"): v for k, v in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    adapter = load(model.store, model.adapter(model.trained("again", **ALL)))
    folder = materialise(model.store, adapter, model.tmp / "older", ["adapter_config.json"])
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    made = publish_directory(model.store, "adapter", folder, adapter.parents, adapter.meta)
    _, same = model.merged(made)
    for name, value in tensors(same).items():
        assert torch.equal(value, tensors(new)[name]), name


def test_only_the_language_model_is_rounded_to_4_bits(do: Convert, store: Store, tmp_path: Path) -> None:
    model = Model(do, store, tmp_path, False, "float32")
    lora = model.trained(target_modules=NONE, modules_to_save=["multi_modal_projector"])
    _, folder = model.merged(model.adapter(lora), base_dtype="nf4")
    base, found = tensors(model.folder), tensors(folder)
    rounded = {n for n, v in found.items() if not torch.equal(v, base[n])}
    assert rounded == {n for n in found if n.endswith("proj.weight") and n.startswith("language_model")} | {
        n for n in found if "projector" in n
    }


def test_what_is_missing_is_told(model: Model) -> None:
    lora = model.trained(**ALL)
    path = lora / "adapter_model.safetensors"
    state = load_file(path)
    gone = next(name for name in state if "linear_2.bias" in name)
    save_file({k: v for k, v in state.items() if k != gone}, path, metadata={"format": "pt"})
    with pytest.raises(InvalidArgument, match=r"linear_2\.bias is missing"):
        model.adapter(lora)
    with pytest.raises(FailedPrecondition, match="LLaVA"):
        model.do(quantize=QuantizeTask(model=ref(model.digest), method="fp8"))
