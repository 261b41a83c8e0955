"""Checkpoints of XTuner (mmengine's and DeepSpeed's, made by golden/make.py) become what their own tools read of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from services.finetune.convert.checkpoints import read_settings
from services.finetune.errors import FailedPrecondition, InvalidArgument
from services.finetune.orders import AdapterTask, ArtifactRef, ImportTask, MergeTask
from services.finetune.store import Store
from services.finetune.store.artifacts import load, materialise, publish_directory
from tests.finetune.convert.conftest import Convert, load_whole
from tests.finetune.convert.families import CONFIGS, FORWARDS, VOCAB, random_weights, write_family
from tests.finetune.convert.golden.base import full_base
from tests.tiny import tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["iter_4", "zero1", "zero2", "zero3"]


def golden(name: str, folder: Path) -> Path:
    """A golden checkpoint in a folder of its own, as an upload brings it."""
    found = GOLDEN / f"{name}.pth"
    if found.is_dir():
        return Path(shutil.copytree(found, folder))
    folder.mkdir()
    shutil.copy(found, folder)
    return folder


class Made:
    """A base in the store, and adapters of uploaded checkpoints on it."""

    def __init__(self, do: Convert, store: Store, base: Path) -> None:
        self.do, self.store = do, store
        self.base = do(import_model=ImportTask(local_path=str(base)))

    def adapter(self, folder: Path, **options: Any) -> str:
        source = ArtifactRef(
            name="workspaces/w/datasets/d/revisions/r1", digest=publish_directory(self.store, "dataset", folder)
        )
        base = ArtifactRef(name="workspaces/w/models/base", digest=self.base)
        return self.do(adapter=AdapterTask(source=source, base=base, **options))


@pytest.fixture
def made(do: Convert, store: Store, llama: Path) -> Made:
    return Made(do, store, llama)


def expected(name: str) -> dict[str, torch.Tensor]:
    """What the original tools read, under PEFT's names."""
    found = load_file(GOLDEN / f"{name}.safetensors")
    return {k.removeprefix("llm.").replace(".default", ""): v for k, v in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_has_the_numbers_that_its_own_tools_read(
    made: Made, store: Store, tmp_path: Path, llama: Path, name: str
) -> None:
    manifest = load(store, made.adapter(golden(name, tmp_path / "c")))
    assert manifest.kind == "adapter" and [p.role for p in manifest.parents] == ["base", "source"]
    folder = materialise(store, manifest, tmp_path / "a")
    found, wanted = load_file(folder / "adapter_model.safetensors"), expected(name)
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 6, 0.1)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    model = AutoModelForCausalLM.from_pretrained(llama)
    wrapped: Any = peft.PeftModel.from_pretrained(model, folder)
    loaded = {k.replace(".default", ""): v for k, v in wrapped.state_dict().items() if "lora_" in k}
    assert all(torch.equal(loaded[k], wanted[k]) for k in wanted)


def test_a_module_that_was_trained_whole_is_consolidated(do: Convert, store: Store, tmp_path: Path) -> None:
    made = Made(do, store, full_base(tmp_path / "base"))
    digest = made.adapter(golden("zero3_full", tmp_path / "c"), max_shard_size_bytes=8000)
    manifest = load(store, digest)
    folder = materialise(store, manifest, tmp_path / "m")
    assert manifest.kind == "merged" and len(list(folder.glob("*.safetensors"))) > 1
    found = {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}
    wanted = expected("zero3_full")
    assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)
    load_whole(folder)
    half = load(store, made.adapter(tmp_path / "c", dtype="bfloat16"))
    rounded = load_file(materialise(store, half, tmp_path / "h") / "model.safetensors")
    assert all(torch.equal(rounded[k], wanted[k].bfloat16()) for k in wanted)


def test_only_the_module_is_left_of_zero_2(made: Made, store: Store, tmp_path: Path) -> None:
    folder = golden("zero2", tmp_path / "c")
    for path in folder.glob("*_optim_states.pt"):
        path.unlink()
    manifest = load(store, made.adapter(folder))
    found = load_file(materialise(store, manifest, tmp_path / "a") / "adapter_model.safetensors")
    assert all(torch.equal(found[k], v.bfloat16().float()) for k, v in expected("zero2").items())


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("zero2", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("zero2", "mp_rank_00_model_states.pt"),
        ("zero3", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("zero3", "*_optim_states.pt"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
    ],
)
def test_a_rank_that_is_missing_is_noticed(made: Made, tmp_path: Path, name: str, gone: str) -> None:
    folder = golden(name, tmp_path / "c")
    for path in list(folder.glob(gone)):
        path.unlink()
    with pytest.raises(InvalidArgument) as caught:
        made.adapter(folder)
    assert caught.value.reason == "CHECKPOINT_INCOMPLETE"


def saved(folder: Path, change: Any, name: str = "iter_4") -> Path:
    """A file of mmengine whose state_dict was changed."""
    state = {k: v.clone() for k, v in load_file(GOLDEN / f"{name}.safetensors").items()}
    change(state)
    folder.mkdir()
    cfg = "model = dict(lora=dict(r=2, lora_alpha=6))"
    torch.save({"state_dict": state, "meta": {"cfg": cfg, "epoch": 1}, "message_hub": {}}, folder / "epoch_1.pth")
    return folder


Q0 = "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"
CHANGES: dict[str, tuple[Any, str, str]] = {
    "half missing": (lambda s: s.pop(Q0.format("A")), "ADAPTER_INCOMPLETE", "layers.0.self_attn.q_proj"),
    "module missing": (lambda s: [s.pop(Q0.format(h)) for h in "AB"], "ADAPTER_INCOMPLETE", "layers.0.self_attn.q_proj"),
    "wrong shape": (lambda s: s.update({Q0.format("B"): torch.ones(5, 2)}), "ADAPTER_INCOMPLETE", "q_proj"),
    "other rank": (lambda s: s.update({Q0.format("A"): torch.ones(3, 32)}), "ADAPTER_INCOMPLETE", "q_proj"),
    "not finite": (lambda s: s[Q0.format("A")].fill_(torch.nan), "ADAPTER_INCOMPLETE", "finite"),
    "untrained": (lambda s: [v.zero_() for k, v in s.items() if "lora_B" in k], "ADAPTER_INCOMPLETE", "nothing was trained"),
    "unknown module": (
        lambda s: s.update({k.replace("s.0.", "s.9."): v for k, v in list(s.items())}), "ADAPTER_MISMATCH", "layers.9"),
    "projector": (lambda s: s.update({"projector.model.0.weight": torch.ones(2, 2)}), "ADAPTER_UNSUPPORTED", "projector"),
    "dora": (lambda s: s.update({Q0.format("magnitude_vector"): torch.ones(2)}), "ADAPTER_UNSUPPORTED", "magnitude"),
    "nothing": (lambda s: s.clear(), "CHECKPOINT_INCOMPLETE", "state_dict"),
    "whole model lacks one": (
        lambda s: (s.clear(), s.update({"llm.model.norm.weight": torch.ones(32)})), "WEIGHTS_INCOMPLETE", "is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_tensor_that_is_missing_or_unknown_is_named(made: Made, tmp_path: Path, what: str) -> None:
    change, reason, said = CHANGES[what]
    with pytest.raises(InvalidArgument) as caught:
        made.adapter(saved(tmp_path / "c", change))
    assert caught.value.reason == reason and said in caught.value.message


def test_alpha_comes_from_the_order_the_config_or_nowhere(made: Made, store: Store, tmp_path: Path) -> None:
    folder = golden("zero3", tmp_path / "c")
    (folder / "mine.py").write_text("alpha = 32\nmodel = dict(lora=dict(type=LoraConfig, r=2, lora_alpha=alpha))")
    config = materialise(store, load(store, made.adapter(folder)), tmp_path / "a") / "adapter_config.json"
    assert json.loads(config.read_text())["lora_alpha"] == 32
    asked = load(store, made.adapter(folder, lora_alpha=8))
    assert (
        json.loads((materialise(store, asked, tmp_path / "b") / "adapter_config.json").read_text())["lora_alpha"] == 8
    )
    (folder / "mine.py").write_text("import os; os.mkdir('canary')")
    with pytest.raises(InvalidArgument) as caught:
        made.adapter(folder)
    assert caught.value.reason == "LORA_ALPHA_UNKNOWN" and not Path("canary").exists()


def test_a_config_is_read_and_never_run() -> None:
    text = (
        "r = 64\nmodel = dict(type=SupervisedFinetune, lora=dict(type=LoraConfig, r=r, lora_alpha=16, bias='none'))\n"
    )
    text += "prompt_template = PROMPT_TEMPLATE.internlm2_chat\n"
    found = read_settings(text)
    assert dict(found.lora) == {"r": 64, "lora_alpha": 16, "bias": "none"} and found.template == "internlm2_chat"
    for hostile in (
        "lora = dict(lora_alpha=__import__('os').mkdir('x'))",
        "f(lora=dict(lora_alpha=1+x))",
        "(" * 5000,
        "\0",
    ):
        assert read_settings(hostile).lora == {}


@pytest.mark.parametrize("name", ["internlm2", "qwen", "baichuan", "chatglm"])
def test_an_adapter_of_fused_modules_is_the_same_on_native_ones(
    do: Convert, store: Store, tmp_path: Path, name: str
) -> None:
    """W + 3 B A in the original's names and forward pass, against our adapter merged into our import."""
    weights = random_weights(name)
    write_family(name, tiny_tokenizer(tmp_path / "m"), weights)
    made = Made(do, store, tmp_path / "m")
    linear = [k for k, v in weights.items() if v.ndim == 2 and (".layers." in k or ".h." in k)]
    state: dict[str, torch.Tensor] = {}
    trained = dict(weights)
    for key in linear:
        out, into = weights[key].shape
        a, b = torch.randn(2, into) * 0.3, torch.randn(out, 2) * 0.3
        module = f"llm.base_model.model.{key.removesuffix('.weight')}"
        state |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
        trained[key] = weights[key] + 3 * b @ a
    (tmp_path / "c").mkdir()
    torch.save({"state_dict": state}, tmp_path / "c" / "iter_1.pth")
    adapter = made.adapter(tmp_path / "c", lora_alpha=6)
    refs = [ArtifactRef(name="n", digest=digest) for digest in (adapter, made.base)]
    merged = do(merge=MergeTask(adapter=refs[0], base=refs[1]))
    folder = materialise(store, load(store, merged), tmp_path / "merged")
    ids = torch.randint(VOCAB, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = load_whole(folder)(ids[None]).logits[0]
    assert not torch.allclose(FORWARDS[name](weights, CONFIGS[name], ids), found, atol=0.1)
    torch.testing.assert_close(found, FORWARDS[name](trained, CONFIGS[name], ids), rtol=1e-4, atol=1e-4)


def test_an_adapter_is_no_base(made: Made, tmp_path: Path) -> None:
    folder = golden("iter_4", tmp_path / "c")
    made.base = made.adapter(folder)
    with pytest.raises(FailedPrecondition) as caught:
        made.adapter(folder)
    assert caught.value.reason == "MODEL_NOT_WHOLE"
