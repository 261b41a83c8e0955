"""XTuner's LLaVA checkpoints become one adapter of the assembled model, and an adapter their three folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from services.finetune.convert.checkpoints import read_part_settings
from services.finetune.errors import InvalidArgument
from services.finetune.orders import AdapterTask, ExportTask, MergeTask
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise, publish_directory
from tests.finetune.convert import towers
from tests.finetune.convert.conftest import Convert
from tests.finetune.convert.test_assemble import load_llava, of_parts, pixels
from tests.finetune.convert.towers import assembled, ref

CONFIG = """
prompt_template = PROMPT_TEMPLATE.internlm2_chat
model = dict(
    type=LLaVAModel,
    freeze_llm=True,
    llm_lora=dict(type=LoraConfig, r=4, lora_alpha=6, lora_dropout=0.05, bias='none', task_type='CAUSAL_LM'),
    visual_encoder_lora=dict(type=LoraConfig, r=2, lora_alpha=3, lora_dropout=0.05, bias='none'))
"""


class Parts:
    """What XTuner trains: language model and tower by PEFT, each on its own, and a projector."""

    def __init__(self, language: Path, tower: Path) -> None:
        torch.manual_seed(5)
        self.language = self._tuned(AutoModelForCausalLM.from_pretrained(language), 4, 6, ["q_proj", "down_proj"])
        self.tower = self._tuned(CLIPVisionModel.from_pretrained(tower), 2, 3, ["q_proj", "fc1"])
        self.projector = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

    def _tuned(self, model: Any, rank: int, alpha: int, targets: list[str]) -> Any:
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    def state(self) -> dict[str, torch.Tensor]:
        """The state_dict that XTuner saves: what was trained, and nothing else. The tower's inner name was still there."""
        llm = {f"llm.{k}": v for k, v in self.language.state_dict().items() if "lora_" in k}
        vision = {
            "visual_encoder." + k.replace("base_model.model.", "base_model.model.vision_model."): v
            for k, v in self.tower.state_dict().items()
            if "lora_" in k
        }
        return llm | vision | {f"projector.model.{k}": v for k, v in self.projector.state_dict().items()}

    @torch.inference_mode()
    def logits(self, language: Path, ids: list[int], tmp: Path) -> torch.Tensor:
        """What the three compute together."""
        states = self.tower(pixel_values=pixels(), output_hidden_states=True).hidden_states
        merged = tmp / "merged-language"
        self.language.merge_and_unload().save_pretrained(merged)
        state = self.projector.state_dict()
        names = {f"linear_{1 + n}.{leaf}": state[f"{2 * n}.{leaf}"] for n in (0, 1) for leaf in ("weight", "bias")}
        logits: torch.Tensor = of_parts(merged, states[-2][0, 1:], names, ids)
        return logits


class Made:
    def __init__(self, do: Convert, store: Store, llama: Path, tmp: Path) -> None:
        self.do, self.store, self.tmp, self.llama = do, store, tmp, llama
        self.tower = towers.clip(tmp / "tower")
        self.base = assembled(do, llama, self.tower)
        self.folder = materialise(store, load(store, self.base), tmp / "base")

    def adapter(self, folder: Path, **options: Any) -> str:
        source = ref(publish_directory(self.store, "dataset", folder), "workspaces/w/datasets/d/revisions/r1")
        return self.do(adapter=AdapterTask(source=source, base=ref(self.base), **options))

    def folder_of(self, digest: str, name: str) -> Path:
        return materialise(self.store, load(self.store, digest), self.tmp / name)

    @torch.inference_mode()
    def logits(self, model: Any, ids: list[int]) -> torch.Tensor:
        token = json.loads((self.folder / "config.json").read_text())["image_token_index"]
        shown = torch.tensor([[token if i < 0 else i for i in ids]])
        logits: torch.Tensor = model.eval()(input_ids=shown, pixel_values=pixels()).logits[..., :259]
        return logits


@pytest.fixture
def made(do: Convert, store: Store, llama: Path, tmp_path: Path) -> Made:
    return Made(do, store, llama, tmp_path)


def checkpoint(folder: Path, state: dict[str, torch.Tensor], config: str = CONFIG) -> Path:
    """As mmengine's Runner writes it."""
    folder.mkdir()
    torch.save({"meta": {"cfg": config, "iter": 4}, "state_dict": state, "message_hub": {}}, folder / "iter_4.pth")
    return folder


IDS = [1, 5, -1, -1, -1, -1, 7, 8]


def test_a_checkpoint_becomes_an_adapter_that_computes_the_same(made: Made, tmp_path: Path) -> None:
    parts = Parts(made.llama, made.tower)
    digest = made.adapter(checkpoint(tmp_path / "c", parts.state()))
    folder = made.folder_of(digest, "adapter")
    manifest = load(made.store, digest)
    assert manifest.meta["template"] == "internlm2_chat"
    assert manifest.meta["parts"] == ["language_model", "projector", "vision_tower"]
    base: Any = LlavaForConditionalGeneration.from_pretrained(made.folder)
    on = made.logits(peft.PeftModel.from_pretrained(base, folder), IDS)
    assert torch.allclose(on, parts.logits(made.llama, IDS, tmp_path), atol=1e-5)
    merged = made.folder_of(made.do(merge=MergeTask(adapter=ref(digest), base=ref(made.base))), "merged")
    assert torch.allclose(made.logits(load_llava(merged), IDS), on, atol=1e-5)


def test_three_folders_become_the_same_adapter(made: Made, tmp_path: Path) -> None:
    parts = Parts(made.llama, made.tower)
    folder = tmp_path / "c" / "iter_4_hf"
    parts.language.save_pretrained(folder / "llm_adapter")
    parts.tower.save_pretrained(folder / "visual_encoder_adapter")
    (folder / "projector").mkdir()
    save_file(
        {f"model.{k}": v for k, v in parts.projector.state_dict().items()}, folder / "projector/model.safetensors"
    )
    (folder / "xtuner_config.py").write_text(CONFIG)
    found = made.folder_of(made.adapter(tmp_path / "c"), "a")
    same = made.folder_of(made.adapter(checkpoint(tmp_path / "d", parts.state())), "b")
    one, other = load_file(found / "adapter_model.safetensors"), load_file(same / "adapter_model.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    about, again = (json.loads((f / "adapter_config.json").read_text()) for f in (found, same))
    differs = {k for k in about if about[k] != again[k]}
    assert differs <= {"lora_dropout"} and (about["r"], about["lora_alpha"]) == (4, 6)


def test_an_adapter_goes_back_into_three_folders(made: Made, tmp_path: Path) -> None:
    parts = Parts(made.llama, made.tower)
    digest = made.adapter(checkpoint(tmp_path / "c", parts.state()))
    folder = made.folder_of(made.do(export=ExportTask(model=ref(digest), form="xtuner")), "out")
    ids = torch.tensor([[1, 5, 9]])
    with torch.inference_mode():
        language: Any = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(made.llama), folder / "llm_adapter"
        )
        assert torch.allclose(language(ids).logits, parts.language(ids).logits, atol=1e-6)
        # PEFT reads the tower's older names as XTuner's transformers has them.
        tower = load_file(folder / "visual_encoder_adapter/adapter_model.safetensors")
        own = {k: v for k, v in parts.state().items() if k.startswith("visual_encoder.")}
        assert tower.keys() == {k.removeprefix("visual_encoder.").replace(".default", "") for k in own}
        about = json.loads((folder / "visual_encoder_adapter/adapter_config.json").read_text())
        assert (about["r"], about["lora_alpha"], about["target_modules"]) == (2, 3, ["fc1", "q_proj"])
    projector = load_file(folder / "projector/model.safetensors")
    assert all(torch.equal(projector[f"model.{k}"], v) for k, v in parts.projector.state_dict().items())
    again = made.folder_of(made.adapter(folder), "again")
    first = load_file(made.folder_of(digest, "first") / "adapter_model.safetensors")
    assert all(torch.equal(v, first[k]) for k, v in load_file(again / "adapter_model.safetensors").items())


def test_the_official_layout_has_the_parts_under_its_names(made: Made) -> None:
    folder = made.folder_of(made.do(export=ExportTask(model=ref(made.base), form="llava")), "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["mm_vision_tower"] == "vision_tower"
    assert (config["mm_projector_type"], config["mm_vision_select_layer"]) == ("mlp2x_gelu", -2)
    state = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    model = load_llava(made.folder)
    projector = {k: state.pop(f"model.mm_projector.{k}") for k in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert torch.equal(projector["0.weight"], model.model.multi_modal_projector.linear_1.weight)
    assert torch.equal(projector["2.bias"], model.model.multi_modal_projector.linear_2.bias)
    # Without the projector it is the language model, which stock transformers loads; so it does the tower.
    plain = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in config.items() if not k.startswith(("mm_", "model_type"))})
    )
    assert not any(plain.load_state_dict(state))
    loaded: Any = CLIPVisionModel.from_pretrained(folder / "vision_tower", output_loading_info=True)
    assert not loaded[1]["missing_keys"] and not loaded[1]["unexpected_keys"]
    with torch.inference_mode():
        own = model.model.vision_tower(pixels(), output_hidden_states=True).hidden_states[-2]
        assert torch.equal(loaded[0].eval()(pixels(), output_hidden_states=True).hidden_states[-2], own)


def test_a_projector_alone_is_the_first_stage(made: Made, tmp_path: Path) -> None:
    parts = Parts(made.llama, made.tower)
    state = {k: v for k, v in parts.state().items() if k.startswith("projector.")}
    digest = made.adapter(checkpoint(tmp_path / "c", state))
    merged = load(made.store, made.do(merge=MergeTask(adapter=ref(digest), base=ref(made.base))))
    before = {f.path: f.digest for f in load(made.store, made.base).files}
    changed = [f.path for f in merged.files if f.digest != before.get(f.path) and f.path.endswith(".safetensors")]
    assert changed == ["model-00003-of-00003.safetensors"]


@pytest.mark.parametrize("part", ["llm", "visual_encoder"])
def test_a_part_that_was_trained_whole_is_saved_whole(made: Made, tmp_path: Path, part: str) -> None:
    torch.manual_seed(3)
    language = AutoModelForCausalLM.from_pretrained(made.llama)
    tower = CLIPVisionModel.from_pretrained(made.tower)
    model: Any = language if part == "llm" else tower
    for value in model.parameters():
        value.data += 0.05 * torch.randn_like(value)
    inner = "" if part == "llm" else "vision_model."
    state = {f"{part}.{inner}{k}": v for k, v in model.state_dict().items()}
    digest = made.adapter(checkpoint(tmp_path / "c", state))
    merged = load_llava(made.folder_of(made.do(merge=MergeTask(adapter=ref(digest), base=ref(made.base))), "merged"))
    own = merged.model.language_model if part == "llm" else merged.model.vision_tower
    trained = model.model if part == "llm" else model
    for name, value in trained.state_dict().items():
        assert torch.equal(own.state_dict()[name][: len(value)] if value.ndim else own.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("projector.model.2.bias"), "ADAPTER_INCOMPLETE"),
        (lambda state: state.pop(next(k for k in state if "visual" in k and "lora_B" in k)), "ADAPTER_INCOMPLETE"),
        (lambda state: state.update({"audio.weight": torch.ones(2)}), "ADAPTER_UNSUPPORTED"),
        (lambda state: state.update({"projector.model.4.weight": torch.ones(2)}), "ADAPTER_UNSUPPORTED"),
        (lambda state: state.update({"projector.model.0.bias": torch.full((32,), torch.nan)}), "ADAPTER_INCOMPLETE"),
    ],
)
def test_what_is_wrong_is_named(made: Made, tmp_path: Path, change: Any, reason: str) -> None:
    state = Parts(made.llama, made.tower).state()
    change(state)
    with pytest.raises(InvalidArgument) as error:
        made.adapter(checkpoint(tmp_path / "c", state))
    assert error.value.reason == reason


def test_each_part_needs_its_alpha(made: Made, tmp_path: Path) -> None:
    state = Parts(made.llama, made.tower).state()
    with pytest.raises(InvalidArgument) as error:
        made.adapter(checkpoint(tmp_path / "c", state, config=""), lora_alpha=6)
    assert error.value.reason == "LORA_ALPHA_UNKNOWN" and "visual_encoder" in error.value.message
    assert read_part_settings(CONFIG)["visual_encoder"]["lora_alpha"] == 3
    assert read_part_settings("llm_lora = (") == {} and read_part_settings("f(llm_lora=dict(r=open('x')))") == {}
