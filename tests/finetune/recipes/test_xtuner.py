"""XTuner's own configs read as data: equal to the catalogue, or refused by line; never run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from services.finetune.config import to_json
from services.finetune.errors import InvalidArgument
from services.finetune.recipes import resolve
from services.finetune.recipes.xtuner import read_xtuner

FOLDER = Path(__file__).with_name("xtuner")
NAMES = sorted(p.name.removesuffix(".py.txt") for p in FOLDER.glob("*_*.py.txt"))
STOCK = "internlm_chat_7b_qlora_oasst1_e3"


def text(name: str) -> str:
    return (FOLDER / f"{name}.py.txt").read_text("utf-8")


def edited(*changes: tuple[str, str], name: str = STOCK) -> str:
    made = text(name)
    for old, new in changes:
        assert old in made
        made = made.replace(old, new)
    return made


def differences(left: Any, right: Any) -> dict[str, tuple[Any, Any]]:
    a, b = (
        {(s, k): v for s, d in to_json(c).items() if isinstance(d, dict) for k, v in d.items()} for c in (left, right)
    )
    return {f"{s}.{k}": (a[s, k], b[s, k]) for s, k in a if a[s, k] != b[s, k]}


def test_the_fixtures_are_what_xtuner_ships() -> None:
    for line in (FOLDER / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("name", NAMES)
def test_a_stock_config_is_its_recipe_but_for_the_optimizers_pages(name: str) -> None:
    read, recipe = read_xtuner(text(name), f"{name}.py"), resolve(name)
    assert read.config.method == recipe.method
    found = differences(recipe.config, read.config)
    # For how many GPUs it is stands in a config's name only.
    assert found.pop("schedule.ranks", (1, 1)) == ((8, 1) if "_gpu8" in name else (1, 1))
    if recipe.since == "llava":
        assert not found
        return
    # XTuner 0.1.9 kept all checkpoints; these texts are of a later one, whose configs say that two are enough.
    assert found.pop("report.keep_last") == (0, 2)
    assert found in ({}, {"optim.name": ("paged_adamw_32bit", "adamw")})
    assert (not found) == (recipe.method == "full" or name.endswith(("_hf", "_e2_gpu8")))
    assert any("float16" in n or "fp16" in n for n in read.notes)


PRETRAIN = "llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain"
FINETUNE = "llava_internlm2_chat_1_8b_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"


def test_the_tutorials_llava_config_is_its_recipe_but_for_its_paths() -> None:
    """As the tutorial edits XTuner's: one row a step, on one GPU, and rows that stand on the machine."""
    data = "/root/tutorial/xtuner/llava/llava_data/"
    fool = edited(
        ('"internlm/internlm2-chat-1_8b"', '"/root/share/internlm2-chat-1_8b"'),
        ('"openai/clip-vit-large-patch14-336"', '"/root/share/clip-vit-large-patch14-336"'),
        (
            '"./work_dirs/llava_internlm2_chat_1_8b_clip_vit_large_p14_336_e1_gpu8_pretrain/iter_2181.pth"',
            '"/root/share/new_models/xtuner/iter_2181.pth"',
        ),
        ('"./data/llava_data/"', f'"{data}"'),
        ('"LLaVA-Instruct-150K/llava_v1_5_mix665k.json"', '"repeated_data.json"'),
        ('data_root + "llava_images"', "data_root"),
        ("batch_size = 16", "batch_size = 1"),
        ('["请描述一下这张照片", "Please describe this picture"]', '["What is the equipment in the image?"]'),
        ('"https://llava-vl.github.io/static/images/view.jpg"', f'"{data}test_img/oph.jpg"'),
        name=FINETUNE,
    )
    read = read_xtuner(fool, "fool.py").config
    found = differences(resolve("internlm2_chat_1_8b_llava_tutorial_fool_config").config, read)
    source = found.pop("data.sources")[1][0]
    assert (source["files"], source["images"]) == ([f"{data}repeated_data.json"], data)
    assert found.pop("report.images") == ([], ["test_img/oph.jpg"])
    expected = {"model.checkpoint", "vision.tower", "vision.pretrained", "report.prompts"}
    assert set(found) == expected and read.data.max_length == 2048
    assert read.schedule.blocks_per_step == 1 and read.lora.rank_pattern == {"*vision_tower.*": 64}


@pytest.mark.parametrize(
    ("name", "changes", "key", "value"),
    [
        (PRETRAIN, [("freeze_visual_encoder=True", "freeze_visual_encoder=False")], "lora.modules_to_save",
         ["vision_tower", "multi_modal_projector"]),
        (PRETRAIN, [("max_length = int(2048 - (336 / 14) ** 2)", "max_length = 100")], "data.max_length", 676),
        (PRETRAIN, [("openai/clip-vit-large-patch14-336", "google/siglip-base-patch16-224")], "data.max_length", 1668),
        (FINETUNE, [("r=64, lora_alpha=16,", "r=512, lora_alpha=256,")], "lora.rank_pattern", {}),
        (FINETUNE, [("r=64, lora_alpha=16,", "r=512, lora_alpha=256,")], "lora.alpha_pattern", {}),
    ],
)  # fmt: skip
def test_an_edit_of_a_llava_config_is_taken_over(
    name: str, changes: list[tuple[str, str]], key: str, value: Any
) -> None:
    section, _, last = key.partition(".")
    assert to_json(read_xtuner(edited(*changes, name=name), "x.py").config)[section][last] == value


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("freeze_llm=True,", "freeze_llm=True, visual_select_layer=-1,", "model.visual_select_layer"),
        ("type=CLIPVisionModel.from_pretrained", "type=EVAModel.from_pretrained", "model.visual_encoder.type"),
        ("lora_dropout=0.05, bias", "lora_dropout=0.1, bias", "model.visual_encoder_lora"),
        ("r=64, lora", "r=64, target_modules=['q_proj'], lora", "model.visual_encoder_lora"),
        ("dataset_map_fn=llava_map_fn", "dataset_map_fn=my_map_fn", "train_dataloader.dataset.dataset_map_fn"),
        ("pad_image_to_square=True", "pad_image_to_square=1", "train_dataloader.dataset.pad_image_to_square"),
    ],
)
def test_what_cannot_be_honoured_of_llava_is_named(old: str, new: str, named: str) -> None:
    made = edited((old, new), name=FINETUNE).replace(
        "import torch\n", "import torch\nfrom a import EVAModel, my_map_fn\n", 1
    )
    with pytest.raises(InvalidArgument) as refused:
        read_xtuner(made, "x.py")
    assert refused.value.reason == "CONFIG_UNSUPPORTED" and named in {v.field for v in refused.value.violations}


def test_a_grouped_order_and_an_address_are_told() -> None:
    notes = " ".join(read_xtuner(text(FINETUNE), "x.py").notes)
    assert "sampler.type" in notes and "evaluation_images: is not fetched" in notes


def test_the_seeds_edited_config_is_its_recipe_with_its_own_paths_and_0_1_9s_pace() -> None:
    read = read_xtuner(text("seed"), "internlm_chat_7b_qlora_oasst1_e3_copy.py")
    found = differences(resolve(STOCK).config, read.config)
    assert found.pop("model.checkpoint") == ("internlm/internlm-chat-7b", "./internlm-chat-7b")
    assert found.pop("data.sources")[1][0]["files"] == ["./openassistant-guanaco"]
    assert found == {
        "schedule.warmup_ratio": (0.03, 0.0),
        "report.checkpoint_every": (31, 500),
        "report.checkpoint_epochs": (0, 1),
    }


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        (("lr = 2e-4", "lr = 2e-4 / 2"), "optim.lr", 1e-4),
        (("batch_size = 1", "batch_size = 2 ** 2"), "schedule.batch_size", 4),
        (("betas = (0.9, 0.999)", "betas = [0.9, 0.95]"), "optim.beta2", 0.95),
        (('SYSTEM = ""', 'name = "Ann"\nSYSTEM = f"You are {name}."'), "report.system", "You are Ann."),
        (("optim_type = AdamW", "optim_type = PagedAdamW32bit"), "optim.name", "paged_adamw_32bit"),
        (("optim_type = AdamW", "optim_type = Lion8bit"), "optim.name", "lion_8bit"),
        (("type=CosineAnnealingLR", "type=PolyLR"), "schedule.kind", "polynomial"),
        (
            ("type=SupervisedFinetune", "type=SupervisedFinetune, use_activation_checkpointing=False"),
            "model.gradient_checkpointing",
            "none",
        ),
        (('bias="none",', 'bias="none", use_rslora=True,'), "lora.use_rslora", True),
        (('bias="none",', 'bias="none", modules_to_save=["lm_head"],'), "lora.modules_to_save", ["lm_head"]),
        (("evaluation_freq = 500", "evaluation_freq = 48"), "report.sample_every", 3),
        (("save_steps = 500", "save_steps = 160"), "report.checkpoint_every", 10),
        (("warmup_ratio = 0.03", "warmup_ratio = 0.1"), "schedule.warmup_ratio", 0.1),
        (("PROMPT_TEMPLATE.internlm_chat", "PROMPT_TEMPLATE.internlm2_chat"), "data.template", "internlm2_chat"),
        (("pack_to_max_length = True", "pack_to_max_length = False"), "data.pack", False),
        (("seed=None", "seed=7"), "schedule.seed", 7),
        (('bnb_4bit_quant_type="nf4"', 'bnb_4bit_quant_type="fp4"'), "quant.kind", "fp4"),
        (("dict(\n        type=LoraConfig,", "LoraConfig("), "lora.rank", 64),
        (('bias="none",', 'bias="none", target_modules=["wqkv"],'), "lora.targets", ["wqkv"]),
        (("max_norm = 1 ", "max_norm = 0.5 "), "optim.clip_norm", 0.5),
    ],
)
def test_an_edit_is_taken_over(change: tuple[str, str], key: str, value: Any) -> None:
    made = edited(change).replace(
        "from torch.optim import AdamW",
        "from torch.optim import AdamW\nfrom b import Lion8bit, PagedAdamW32bit, PolyLR",
    )
    section, _, name = key.partition(".")
    assert to_json(read_xtuner(made, "x.py").config)[section][name] == value


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        (('"cosine"', '"linear"'), "schedule.kind", "linear"),
        (('    lr_scheduler_type="cosine",\n', ""), "schedule.kind", "linear"),  # transformers' own default
        (('"paged_adamw_32bit"', '"lion_8bit"'), "optim.name", "lion_8bit"),
        (("fp16=True,", "gradient_checkpointing=True,"), "model.gradient_checkpointing", "full"),
    ],
)
def test_an_edit_for_hugging_faces_trainer_is_taken_over(change: tuple[str, str], key: str, value: str) -> None:
    read = read_xtuner(edited(change, name="internlm_7b_qlora_oasst1_e3_hf"), "x.py")
    section, _, name = key.partition(".")
    assert to_json(read.config)[section][name] == value


def test_without_quantisation_it_is_lora_and_without_lora_full() -> None:
    made = text(STOCK)
    start = made.index("        quantization_config=dict(")
    end = made.index("    lora=dict(")
    plain = made[:start] + "    ),\n" + made[end:]
    assert read_xtuner(plain, "x.py").config.method == "lora"
    start, end = (
        plain.index("    lora=dict("),
        plain.index("#" * 71, plain.index("    lora=dict(")),
    )
    assert read_xtuner(plain[:start] + ")\n\n" + plain[end:], "x.py").config.method == "full"


@pytest.mark.parametrize(
    ("name", "changes", "key", "value"),
    [
        ("files", {"data_path": "./x"}, "files", ["./x"]),
        ("hub", {"data_path": "me/rows"}, "hub_id", "me/rows"),
    ],
)
def test_a_data_path_is_files_or_a_hubs_id(name: str, changes: dict[str, Any], key: str, value: Any) -> None:
    config = read_xtuner(text(STOCK), "x.py", changes).config
    assert to_json(config)["data"]["sources"][0][key] == value


def test_options_change_a_variable_before_it_is_used_and_a_key_after() -> None:
    given = {"lr": 1e-5, "train_dataloader.batch_size": 3, "model.lora.r": 8, "custom_hooks.1.max_new_tokens": 20}
    config = read_xtuner(text(STOCK), "x.py", given).config
    assert (config.optim.lr, config.schedule.batch_size, config.lora.rank) == (1e-5, 3, 8)
    assert config.report.sample_tokens == 20
    for key in ("lrr", "model.lorra.r", "custom_hooks.9.x"):
        with pytest.raises(InvalidArgument) as refused:
            read_xtuner(text(STOCK), "x.py", {key: 1})
        assert refused.value.reason == "CONFIG_KEY_UNKNOWN"


def test_a_base_config_beside_it_is_read() -> None:
    made = "from mmengine.config import read_base\nwith read_base():\n    from .stock import *\n"
    made += "model.update(dict(lora=None))\nmodel['llm'].update(quantization_config=None)\n"
    made += "optim_wrapper['optimizer']['lr'] = 1e-6\n"
    config = read_xtuner(made, "x.py", neighbour={"stock.py": text(STOCK)}.__getitem__).config
    assert (config.method, config.quant.bits, config.optim.lr) == ("full", 0, 1e-6)
    with pytest.raises(InvalidArgument, match="stands beside the config"):
        read_xtuner(made, "x.py")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ('bias="none"', 'bias="all"', "model.lora.bias"),
        ('bias="none"', "use_qalora=True", "model.lora.use_qalora"),
        ("type=SupervisedFinetune", "type=MyModel", "model.type"),
        ("type=optim_type", "type=Lion", "optim_wrapper.optimizer.type"),
        ("dataset_map_fn=oasst1_map_fn", "dataset_map_fn=my_map_fn", "train_dataloader.dataset.dataset_map_fn"),
        ("type=CosineAnnealingLR", "type=StepLR", "param_scheduler[1].type"),
        ("load_from = None", "load_from = 'x.pth'", "load_from"),
        ("visualizer = None", "strategy = dict(type='DeepSpeedStrategy')", "strategy"),
        ("dict(type=DatasetInfoHook, tokenizer=tokenizer)", "dict(type=MyHook)", "custom_hooks[0].type"),
        ("shuffle=True)", "shuffle=False)", "train_dataloader.sampler.shuffle"),
        ("by_epoch=True,\n        begin=0", "by_epoch=False,\n        begin=0", "param_scheduler[0].by_epoch"),
        ("remove_unused_columns=True", "group_by_length=True", "train_dataloader.dataset.group_by_length"),
    ],
)
def test_what_cannot_be_honoured_is_named_with_its_line(old: str, new: str, named: str) -> None:
    extra = "\nfrom a import Lion, LLaVAModel, MyHook, MyModel, StepLR, my_map_fn\n"
    made = edited((old, new)).replace("import torch\n", f"import torch{extra}", 1)
    line = next(n for n, content in enumerate(made.splitlines(), 1) if new.splitlines()[0] in content)
    with pytest.raises(InvalidArgument) as refused:
        read_xtuner(made, "x.py")
    assert refused.value.reason == "CONFIG_UNSUPPORTED"
    blamed = {v.field: v.message for v in refused.value.violations}
    assert named in blamed and f"line {line}" in blamed[named]


def test_all_faults_are_told_at_once() -> None:
    made = edited(('bias="none"', 'bias="all"'), ("shuffle=True)", "shuffle=False)"))
    with pytest.raises(InvalidArgument, match="and 1 more") as refused:
        read_xtuner(made, "x.py")
    assert len(refused.value.violations) == 2
