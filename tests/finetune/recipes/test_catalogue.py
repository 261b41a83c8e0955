"""The catalogue against XTuner 0.1.9's: reference/ holds its names and, evaluated there, its values."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from services.finetune.config import RunConfig, from_json, to_json
from services.finetune.errors import InvalidArgument, NotFound
from services.finetune.recipes import names, resolve
from services.finetune.recipes.deepspeed import preset_json, preset_of, presets
from services.finetune.recipes.tables import FORMATS, steps, systems
from services.finetune.templates import TEMPLATES

REFERENCE = Path(__file__).with_name("reference")
TABLES = json.loads((REFERENCE / "xtuner_tables.json").read_text())
SEED = list(csv.DictReader((REFERENCE / "xtuner_seed_tuples.tsv").read_text().splitlines(), delimiter="\t"))
TRAINED = [row for row in SEED if row["model"] != "-"]
# XTuner's own; templates.py may not have them all.
XTUNER_TEMPLATES = {"baichuan_chat", "baichuan2_chat", "chatglm2", "chatglm3", "gemma", "moss_sft", "phi3_chat"}
FAMILIES = ["llama3_", "qwen2_5_", "qwen3_", "internlm2_", "internlm2_5_", "internlm3_", "mistral", "gemma", "phi"]
FAMILIES += ["smollm2_", "deepseek_r1_distill_"]
BITS = {"qlora": 4, "int8_lora": 8, "full": 0}
# The 70B's 4-bit config and StarCoder's set their own; all else follows from the method.
TARGETS = {"int8_lora": ["gate_proj", "down_proj", "up_proj"], "qlora": ["all-linear"]}
LORA = {"qlora": (64, 16, 0.1), "int8_lora": (16, 16, 0.05), "stack_exchange": (16, 32, 0.05)}


def config(name: str) -> dict[str, Any]:
    data: dict[str, Any] = to_json(resolve(name).config)
    return data


def test_the_seeds_names_are_exactly_these() -> None:
    assert names(since="seed") == sorted(row["name"] for row in SEED)
    assert len(SEED) == 301
    assert set(names(since="seed")) < set(names()) and names() == sorted(names())


@pytest.mark.parametrize("pattern", ["internlm", "QLoRA", "_e3_hf", "deepspeed", "no such"])
def test_a_pattern_is_part_of_a_name_whatever_its_case(pattern: str) -> None:
    assert names(pattern) == [n for n in names() if pattern.lower() in n]


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row["name"])
def test_each_of_the_seeds_recipes_has_the_references_values(row: dict[str, str]) -> None:
    name, method = row["name"], row["method"]
    recipe, made = resolve(name), config(name)
    model = TABLES["models"][row["model"]]
    wanted = TABLES["method_dataset"][f"{method}|{name.partition(f'_{method}_')[2]}"]
    assert (recipe.model, recipe.method, recipe.since) == (row["model"], method, "seed")
    assert made["model"]["checkpoint"] == recipe.checkpoint == model["hf_id"]
    assert (made["method"], made["quant"]["bits"], made["quant"]["kind"]) == (method, BITS[method], "nf4")
    assert made["quant"]["double_quant"] is True
    assert (made["data"]["max_length"], made["data"]["pack"]) == (wanted["max_length"], bool(wanted["pack"]))
    assert made["schedule"]["epochs"] == int(row["epoch"].replace("-", "1"))
    assert [made["optim"][k] for k in ("beta1", "beta2", "clip_norm")] == [*TABLES["constants"]["betas"], 1]
    assert [source(s) for s in made["data"]["sources"]] == [reference(s) for s in wanted["sources"]]
    if wanted["training_args"]:
        assert_hugging_faces_trainer(made)
        return
    assert made["optim"]["name"] == {"PagedAdamW32bit": "paged_adamw_32bit", "AdamW": "adamw"}[wanted["optim"]]
    assert (made["optim"]["lr"], made["optim"]["weight_decay"]) == (wanted["lr"], wanted["weight_decay"])
    accumulate = wanted["accumulative_counts"]
    assert (made["schedule"]["batch_size"], made["schedule"]["accumulate"]) == (wanted["batch_size"], accumulate)
    assert made["report"]["sample_every"] == steps(wanted["evaluation_freq"], accumulate)
    assert made["report"]["system"].startswith(system(wanted["system"]))
    assert made["report"]["prompts"]


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row["name"])
def test_each_of_the_seeds_recipes_has_the_references_lora_and_template(row: dict[str, str]) -> None:
    made, method = config(row["name"]), row["method"]
    if method != "full":
        rank, alpha, dropout = LORA["stack_exchange" if row["model"] == "starcoder" else method]
        dropout = 0.05 if row["model"] == "mistral_7b" else dropout
        assert (made["lora"]["rank"], made["lora"]["alpha"], made["lora"]["dropout"]) == (rank, alpha, dropout)
        own = {"llama2_70b": TARGETS["int8_lora"], "starcoder": ["c_proj", "c_attn", "q_attn"]}
        assert made["lora"]["targets"] == own.get(row["model"], TARGETS[method])
    own_template = {"moss_sft_all": "moss_sft", "moss_sft_plugins": "moss_sft", "msagent_react": "default"}
    template = TABLES["models"][row["model"]]["template_v0_2_0"] or "none"
    if row["model"] == "internlm_7b" and method == "full":
        template = "internlm_chat"  # 0.2.0 left these five as they were
    assert made["data"]["template"] == own_template.get(row["dataset"], template)
    assert made["data"]["max_rows"] == (20000 if row["model"] == "starcoder" else 0)
    assert made["schedule"]["warmup_ratio"] == (0 if row["suffix"] == "hf" else 0.03)


def assert_hugging_faces_trainer(made: dict[str, Any]) -> None:
    assert made["schedule"]["warmup_steps"] == 100 and made["schedule"]["warmup_ratio"] == 0
    assert (made["schedule"]["batch_size"], made["schedule"]["accumulate"]) == (1, 16)
    assert made["report"]["checkpoint_every"] == 1000 and not made["report"]["prompts"]


def source(made: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    """Where rows come from, in the reference's words."""
    rest = {"name": made["subset"], "data_dir": made["folder"]}
    place = made["hub_id"] or made["files"][0]
    return place, made["format"], {k: v for k, v in rest.items() if v}


def reference(wanted: dict[str, Any]) -> tuple[str, str, dict[str, str]]:
    arguments = {k: v for k, v in wanted["source_args"].items() if k != "split"}
    place = arguments.pop("data_files", {}).get("train", wanted["source"])
    return place, {**FORMATS, "MOSSSFTDataset": "moss_sft"}[wanted["map_fn"]], arguments


def system(wanted: str) -> str:
    """The start of a system text; the reference cuts long ones."""
    if wanted == "None":
        return ""
    if not wanted.startswith("SYSTEM_TEMPLATE."):
        return wanted.replace("{{", "{")
    text = systems()[wanted.removeprefix("SYSTEM_TEMPLATE.")]
    return text.partition("{bot_name}")[0]


def test_moss_texts_name_the_model() -> None:
    text = config("llama2_7b_qlora_moss_sft_all_e1")["report"]["system"]
    assert "whose name is Llama2.\n" in text and "{" not in text


@pytest.mark.parametrize("name", names())
def test_every_name_on_offer_is_a_whole_config(name: str) -> None:
    recipe = resolve(name)
    data = to_json(recipe.config)
    assert to_json(from_json(RunConfig, data)) == data
    if recipe.method != "deepspeed":
        known = {"tokenizer", "none", *TEMPLATES, *XTUNER_TEMPLATES}
        assert recipe.checkpoint and recipe.config.data.template in known and recipe.config.method == recipe.method


def test_the_names_of_llava_are_xtuners_and_the_tutorials() -> None:
    found = names(since="llava")
    grammar = r"llava_\w+?(_full|_qlora|_quant)?_clip_vit_large_p14_336(_lora|_full)?_e[12]_gpu[18](_\w+)?"
    grammar += "_(pretrain|finetune)"
    assert len([n for n in found if re.fullmatch(grammar + "(_refcoco)?", n)]) == 27
    assert len([n for n in found if re.fullmatch(r"llava_v15_(7|13)b_(pretrain|finetune|finetune_lora)", n)]) == 6
    assert len(found) == 34 and "internlm2_chat_1_8b_llava_tutorial_fool_config" in found


@pytest.mark.parametrize("name", names(since="llava"))
def test_each_llava_recipe_says_what_is_trained(name: str) -> None:
    made = resolve(name).config
    whole, saved = made.method == "full", made.lora.modules_to_save
    assert made.vision.tower == "openai/clip-vit-large-patch14-336" and made.data.max_length in (2048, 4096)
    assert whole or saved[-1] == "multi_modal_projector"
    assert ("pretrain" in name.rpartition("_e1")[2] or name.endswith("_pretrain")) == (not made.vision.pretrained)
    if name.endswith("pretrain"):
        assert not made.lora.targets and not made.vision.pad_to_square and made.optim.lr in (1e-3, 5e-4)
    else:
        assert made.vision.pad_to_square and made.optim.lr == (
            2e-4 if "*language_model.*" in made.lora.targets else 2e-5
        )
    assert made.schedule.blocks_per_step == (1 if "fool" in name else 256 if name.endswith("pretrain") else 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_modern_models_are_offered_and_marked(family: str) -> None:
    found = [n for n in names(family, "quartet") if n.startswith(family)]
    assert found and not set(found) & set(names(since="seed"))
    assert all(resolve(n).since == "quartet" for n in found)


def test_what_is_not_offered_resolves_untested() -> None:
    recipe = resolve("qwen3_0_6b_int8_lora_medical_e7")
    assert (recipe.tested, recipe.since, recipe.method) == (False, "", "int8_lora")
    assert recipe.config.schedule.epochs == 7 and recipe.config.quant.bits == 8
    assert resolve("smollm2_135m_lora_assistant_e1").tested


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "internlm_7b_qlora_oasst1",
        "internlm_7b_qlora_oasst1_e0",
        "internlm_7b_qlora_oasst1_e3_gpu9",
        "a_qlora_b_e3",
    ],
)
def test_what_no_table_has_is_unknown(name: str) -> None:
    with pytest.raises(NotFound) as refused:
        resolve(name)
    assert refused.value.reason == "RECIPE_UNKNOWN"


def test_a_near_name_is_named() -> None:
    with pytest.raises(NotFound, match="did you mean 'internlm_chat_7b_qlora_oasst1_e3'"):
        resolve("internlm_chat_7b_qlora_oast1_e3")


def test_presets_are_found_again_in_their_json() -> None:
    assert [preset_of(preset_json(name), "x.json") for name in presets()] == presets()
    assert all(resolve(name).config.parallel.deepspeed == name for name in presets())
    tuned = preset_json("deepspeed_zero3_offload")
    tuned["zero_optimization"] = {**tuned["zero_optimization"], "reduce_bucket_size": 5e8, "overlap_comm": False}
    assert preset_of({**tuned, "steps_per_print": 10}, "x.json") == "deepspeed_zero3_offload"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"zero_optimization": {"stage": 0}}, "no preset"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "nvme"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": None}, "missing"),
    ],
)
def test_what_no_preset_has_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        preset_of({**preset_json("deepspeed_zero2"), **change}, "x.json")
