"""Each method learns, goes on bit for bit, and what conversion makes of it is the model that was trained."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from services.finetune.config import RunConfig, matches, override
from services.finetune.errors import FailedPrecondition, InvalidArgument, QuartetError
from services.finetune.packing import Blocks
from services.finetune.plan import Held
from services.finetune.prepare import MADE
from services.finetune.store import Store
from services.finetune.store.artifacts import load
from services.finetune.train import memory, methods
from services.finetune.train.model import choose_dtype, load_model, summed_loss, trainable
from tests.finetune.convert.conftest import load_whole
from tests.finetune.train.conftest import CHANGES, Bench, Ran
from tests.finetune.train.test_model import tensors

FOUR: dict[str, Any] = {"method": "qlora", "quant__bits": 4}
MIXED: dict[str, Any] = {
    "lora__targets": ["model.layers.?.self_attn.*", "layers.1.mlp.down_proj"],
    "lora__rank_pattern": {"model.layers.0.*": 2, "down_proj": 8},
    "lora__alpha_pattern": {"q_proj": 3.0},
    "lora__modules_to_save": ["lm_head", "model.norm"],
}
ASKED: dict[str, Any] = {"model__dtype": "bfloat16", "report__prompts": ["say"], "report__sample_tokens": 3}
WAYS: dict[str, dict[str, Any]] = {
    "lora, rslora and lora+": {"lora__use_rslora": True, "lora__loraplus_lr_ratio": 4.0, "optim__lr": 1e-3},
    "lora, dora": {"lora__use_dora": True},
    "lora, patterns and saved modules": MIXED,
    "lora, saved modules in bfloat16": {**MIXED, **ASKED},
    "qlora, fp4": {**FOUR, "quant__kind": "fp4", "quant__double_quant": False},
    "qlora, dora": {**FOUR, "lora__use_dora": True, "optim__name": "paged_adamw_8bit"},
    "int8_lora": {"method": "int8_lora", "quant__bits": 8},
    "full": {"method": "full", "optim__lr": 1e-3, "optim__weight_decay": 0.1},
    "full in bfloat16, a part frozen": {
        **ASKED,
        "method": "full",
        "optim__lr": 1e-3,
        "model__freeze": ["embed_tokens", "model.layers.0.*"],
    },
}


def loss_of(model: Any, ran: Ran, dtype: torch.dtype) -> float:
    """The mean loss over every learned token of a run's rows."""
    blocks = tensors(Blocks.open(ran.folder / MADE))
    with torch.no_grad():
        summed = summed_loss(model.train(), *blocks, dtype=dtype)
    return float(summed) / int((blocks[1] >= 0).sum())


def base_of(bench: Bench, way: dict[str, Any], dtype: torch.dtype) -> Any:
    quant = None
    if way.get("quant__bits") == 4:
        kind, double = way.get("quant__kind", "nf4"), way.get("quant__double_quant", True)
        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    if way.get("quant__bits") == 8:
        quant = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(bench.model, dtype=dtype, quantization_config=quant)


@pytest.mark.parametrize("name", WAYS)
def test_it_learns_goes_on_bit_for_bit_and_converts_to_what_it_was(bench: Bench, name: str) -> None:
    way = WAYS[name]
    dtype = torch.bfloat16 if way.get("model__dtype") == "bfloat16" else torch.float32
    ran = bench.train(**way)
    assert ran.losses[3] < ran.losses[2] < ran.losses[0]
    resumed = bench.train(resume=ran.checkpoints[2], **way)
    assert resumed.losses == ran.losses[2:]
    assert bench.files(resumed.last) == bench.files(ran.last)

    digest, folder = bench.convert(ran.checkpoints[2])
    kind = load(bench.store, digest).kind
    if way.get("method") == "full":
        assert kind == "merged"
        made = load_whole(folder)
    else:
        assert kind == "adapter"
        made = peft.PeftModel.from_pretrained(base_of(bench, way, dtype), str(folder))
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["use_rslora"] is way.get("lora__use_rslora", False)
        assert config["use_dora"] is way.get("lora__use_dora", False)
        assert config["modules_to_save"] == (["model.norm", "lm_head"] if "lora__targets" in way else None)
    # The third step's loss is that of the weights after two.
    close = pytest.approx(ran.losses[2], rel=2e-3 if dtype == torch.bfloat16 else 1e-6)
    assert loss_of(made, ran, dtype) == close
    if kind == "adapter" and "quant__bits" not in way:
        merged = load_whole(bench.merge(digest)[1])
        assert loss_of(merged, ran, dtype) == close


def test_frozen_parts_keep_their_bytes_and_a_dtype_is_rounded_to_once(bench: Bench) -> None:
    ran = bench.train(**WAYS["full in bfloat16, a part frozen"])
    assert {p.dtype for p in load_file(bench.convert(ran.last)[1] / "model.safetensors").values()} == {torch.float32}
    before, after = (load_file(f / "model.safetensors") for f in (bench.model, bench.convert(ran.last, "bfloat16")[1]))
    assert before.keys() == after.keys()
    for name, value in after.items():
        frozen = "embed_tokens" in name or ".layers.0." in name
        assert value.dtype == torch.bfloat16 and torch.equal(value, before[name].bfloat16()) == frozen, name


def test_a_tied_head_is_trained_and_written_once(file_store: Store, tmp_path: Path, tiny: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "tied")
    for path in tiny.iterdir():
        if not (tmp_path / "tied" / path.name).exists():
            (tmp_path / "tied" / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "tied" / "model.safetensors")
    # Some models' files hold the head again, and some have no name for the whole, which transformers gives it.
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(weights, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    bench = Bench(file_store, tmp_path, tmp_path / "tied")
    ran = bench.train(method="full", optim__lr=1e-3)
    _, folder = bench.convert(ran.checkpoints[2])
    assert load_file(folder / "model.safetensors").keys() == weights.keys() - {"lm_head.weight"}
    made = load_whole(folder)
    assert made.lm_head.weight is made.model.embed_tokens.weight
    assert loss_of(made, ran, torch.float32) == pytest.approx(ran.losses[2], rel=1e-6)


def test_float16_has_a_loss_scale_that_is_kept_and_a_skipped_step_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Too large at first, as it would come to be after some thousand steps.
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**19)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    way: dict[str, Any] = {
        "model__dtype": "float16",
        "optim__lr": 2e-3,
        "schedule__max_steps": 8,
        "report__checkpoint_every": 4,
    }
    ran = bench.train(**way)
    assert ran.said("as configured, with a loss scale")
    skipped = [log for log in ran.logs if "skipped" in log]
    assert skipped and skipped[0].startswith("step 1 was skipped: its float16 gradients overflowed")
    assert ran.losses[0] == ran.losses[1] > ran.losses[-1]
    resumed = bench.train(resume=ran.checkpoints[4], **way)
    assert bench.files(resumed.last) == bench.files(ran.last)


def test_running_layers_twice_changes_no_number(bench: Bench) -> None:
    way: dict[str, Any] = {"lora__dropout": 0.1}
    ran = {kind: bench.train(model__gradient_checkpointing=kind, **way) for kind in ("none", "full", "selective")}
    assert ran["none"].said("no layer runs forward twice")
    assert ran["full"].said("2 of 2 layers run forward twice")
    assert ran["selective"].said("1 of 2 layers run forward twice")
    assert ran["none"].losses == ran["full"].losses == ran["selective"].losses
    assert bench.files(ran["none"].last) == bench.files(ran["full"].last)


@pytest.mark.parametrize(
    ("kind", "runs"), [("none", [1, 1]), ("full", [2, 2]), ("selective", [2, 1]), ("auto", [1, 1])]
)
def test_layers_that_are_chosen_run_twice(tiny: Path, kind: str, runs: list[int]) -> None:
    changes = {**CHANGES, "model.gradient_checkpointing": kind}
    config = override(RunConfig(), changes)
    model = load_model(tiny, config, torch.float32)
    memory.recompute(model.get_base_model(), config.model, torch.device("cpu"))
    count = [0, 0]
    for n, layer in enumerate(model.get_base_model().model.layers):

        def counted(*_: Any, n: int = n) -> None:
            count[n] += 1

        layer.mlp.register_forward_pre_hook(counted)  # the end of a layer is not needed again
    model.train()
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert count == runs


@pytest.mark.parametrize(("kind", "recomputed"), [("auto", 3), ("none", 0), ("full", 8), ("selective", 4)])
def test_the_fused_plan_keeps_to_what_is_wanted(kind: str, recomputed: int) -> None:
    config = override(RunConfig(), {"model.gradient_checkpointing": kind}).model
    made = memory.bound(Held(layers=8, recomputed=3, per_layer=1, working=1, inputs=1), config)
    assert made.recomputed == recomputed


def refused(bench: Bench, **changes: Any) -> QuartetError:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    with pytest.raises((InvalidArgument, FailedPrecondition)) as caught:
        load_model(bench.model, override(RunConfig(), {**CHANGES, **named}), torch.float32)
    return caught.value


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora__targets": ["q_porj"]}, "'lora.targets'.*'q_porj'.*'q_proj'"),
        ({"lora__targets": ["model.layers.7.*"]}, r"'lora.targets'.*'model.layers.7.\*'"),
        ({"lora__targets": ["embed_tokens"]}, "'lora.targets'.*'embed_tokens'"),
        ({"lora__rank_pattern": {"lm_head": 2}}, "'lora.rank_pattern'.*'lm_head'"),
        ({"lora__modules_to_save": ["lm_heed"]}, "'lora.modules_to_save'.*'lm_head'"),
        ({**FOUR, "lora__modules_to_save": ["o_proj"]}, "'lora.modules_to_save'.*o_proj is quantised"),
        ({"method": "full", "model__freeze": ["model", "lm_head"]}, "'model.freeze'.*nothing is left"),
        ({"method": "int8_lora", "quant__bits": 8, "lora__use_dora": True}, "needs a GPU"),
    ],
)
def test_what_cannot_be_trained_is_named(bench: Bench, changes: dict[str, Any], told: str) -> None:
    error = refused(bench, **changes)
    assert re.search(told, error.message), error.message
    assert error.reason in ("CONFIG_VALUE_INVALID", "MODEL_NOT_TRAINABLE")


def test_weights_that_could_not_be_written_back_are_refused_before_training(tmp_path: Path, tiny: Path) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    model = load_model(tmp_path, override(RunConfig(), {**CHANGES, "method": "full"}), torch.float32)
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FailedPrecondition, match="could not be written back"):
        methods.check_writable(model, tmp_path)


def test_all_linear_may_have_more_beside_it(tiny: Path) -> None:
    config = override(RunConfig(), {**CHANGES, "lora.targets": ["all-linear", "lm_head"]})
    assert len(trainable(load_model(tiny, config, torch.float32))) == 2 * (2 * 7 + 1)


NAMES = st.from_regex(r"(model|lm_head)(\.(layers|0|1|10|mlp|q_proj)){0,4}", fullmatch=True)
PATTERNS = st.one_of(NAMES, st.from_regex(r"[*?\[01a-z!\].]{1,12}", fullmatch=True))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a crowded machine is no fault of the patterns
@given(PATTERNS, NAMES)
def test_peft_understands_a_pattern_as_we_do(pattern: str, name: str) -> None:
    try:
        made = methods._regex(pattern)
    except InvalidArgument:
        return
    assert bool(re.match(rf"(.*\.)?({made})$", name)) == matches(pattern, name)


def test_each_dtype_has_a_reason() -> None:
    told = {wanted: choose_dtype(wanted) for wanted in ("auto", "bfloat16", "float16", "float32")}
    assert told["auto"][0] in (torch.bfloat16, torch.float32)
    assert all(told[name][0] == getattr(torch, name) for name in ("bfloat16", "float16", "float32"))
    assert all("bfloat16" in why or why == "as configured" for _, why in told.values())
