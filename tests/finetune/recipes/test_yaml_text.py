"""Our YAML: what is written is read back, and an edit gone wrong is named with its line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.finetune.config import RunConfig, from_json, override, to_json
from services.finetune.errors import InvalidArgument
from services.finetune.recipes import names, resolve
from services.finetune.recipes.yaml_text import read_yaml, write_yaml

NAME = "internlm_chat_7b_qlora_oasst1_e3"
TEXT = write_yaml(resolve(NAME).config, NAME)


@pytest.mark.parametrize("name", names(since="seed"))
def test_every_one_of_the_seeds_recipes_survives(name: str) -> None:
    assert read_yaml(write_yaml(resolve(name).config, name), "x.yaml") == resolve(name).config


LINES = st.lists(st.sampled_from(["a", " a", "a ", "", "# a", "- a", "a: b", "\ta", "'", '"', "…"])).map("\n".join)


@settings(deadline=None)
@given(LINES)
def test_any_lines_survive(text: str) -> None:
    config = override(RunConfig(), {"report.system": text, "report.prompts": [text]})
    assert read_yaml(write_yaml(config, "x"), "x.yaml") == config


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1e9), st.integers(0, 10**15))
def test_any_text_and_number_survives(text: str, lr: float, seed: int) -> None:
    changes = {"report.system": text, "report.prompts": [text, "1e-3", "yes"], "optim.lr": lr, "schedule.seed": seed}
    config = override(RunConfig(), changes)
    assert read_yaml(write_yaml(config, "x"), "x.yaml") == config


def test_it_is_for_people() -> None:
    assert TEXT.startswith(f"# {NAME}: edit") and "请给我介绍五个上海的景点" in TEXT
    assert all(
        f"\n{section}:\n" in TEXT for section in ("model", "lora", "quant", "data", "optim", "schedule", "report")
    )
    assert max(len(line) for line in TEXT.splitlines()) <= 120


@pytest.mark.parametrize(
    ("old", "new"), [("lr: 0.0002", "lr: 1e-3"), ("lr: 0.0002", "lr: 1"), ("epochs: 3", "epochs: 3.0")]
)
def test_numbers_as_people_write_them(old: str, new: str) -> None:
    assert old in TEXT
    read_yaml(TEXT.replace(old, new), "x.yaml")


def test_what_is_left_out_has_its_default() -> None:
    assert read_yaml("", "x.yaml") == RunConfig()
    assert read_yaml("optim:\n  lr: 1e-3\n", "x.yaml").optim.lr == 1e-3


@pytest.mark.parametrize(
    ("text", "reason", "told"),
    [
        ("method: qlora\noptim:\n  lrr: 1\n", "CONFIG_KEY_UNKNOWN", "x.yaml:3: .*did you mean 'lr'"),
        ("optin:\n  lr: 1\n", "CONFIG_KEY_UNKNOWN", "x.yaml:1: .*did you mean 'optim'"),
        ("optim:\n  lr: fast\n", "CONFIG_VALUE_INVALID", "x.yaml:2: "),
        ("data:\n  sources:\n  - files: []\n    fromat: a\n", "CONFIG_KEY_UNKNOWN", "x.yaml:4: .*'format'"),
        ("lora:\n  rank_pattern:\n    q_proj: two\n", "CONFIG_VALUE_INVALID", "x.yaml:3: .*rank_pattern.q_proj"),
        ("lora:\n  rank_pattern: [8]\n", "CONFIG_VALUE_INVALID", "x.yaml:2: .*an object"),
        ("method: lora\nmethod: qlora\n", "CONFIG_SYNTAX", "x.yaml:2:1: the key 'method' stands twice"),
        ("a: &x 1\nb: *x\n", "CONFIG_SYNTAX", "x.yaml:1:4: anchors"),
        ("model: !!python/object/apply:os.system ['id']\n", "CONFIG_SYNTAX", "x.yaml:1:8: the tag"),
        ("optim:\n  lr: !!int x\n", "CONFIG_SYNTAX", "x.yaml:2:7: 'x' is no number"),
        ("optim: {lr: 1\n", "CONFIG_SYNTAX", "x.yaml:2:1: not YAML"),
        ("- 1\n", "CONFIG_VALUE_INVALID", "x.yaml:1: "),
        ("a: 1\n---\nb: 2\n", "CONFIG_SYNTAX", "x.yaml:2:1: not YAML"),
        ("a: [" * 5000, "CONFIG_SYNTAX", "x.yaml"),
        ("x" * (2 << 20), "CONFIG_SYNTAX", "1 MiB"),
    ],
)
def test_a_wrong_edit_is_named_with_its_line(text: str, reason: str, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told) as refused:
        read_yaml(text, "x.yaml")
    assert refused.value.reason == reason


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=20), st.integers(1, 512)), st.dictionaries(st.text(max_size=20), st.floats(0, 99))
)
def test_patterns_are_written_and_read_whatever_they_hold(ranks: dict[str, int], alphas: dict[str, float]) -> None:
    config = override(RunConfig(), {"lora.rank_pattern": ranks, "lora.alpha_pattern": alphas})
    assert read_yaml(write_yaml(config, "x"), "x.yaml") == config == from_json(RunConfig, to_json(config))


@settings(deadline=None)
@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_yaml(text, "x.yaml")
    except InvalidArgument as error:
        assert error.reason in ("CONFIG_SYNTAX", "CONFIG_KEY_UNKNOWN", "CONFIG_VALUE_INVALID")
