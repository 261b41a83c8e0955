from __future__ import annotations

import re

import pytest

from services.common.names import choose_id, now, parse
from services.finetune.errors import InvalidArgument

DATASET = "workspaces/{workspace}/datasets/{dataset}"


def test_a_good_name_gives_its_ids() -> None:
    assert parse(DATASET, "workspaces/default/datasets/a-1") == {"workspace": "default", "dataset": "a-1"}
    step = parse(
        "workspaces/{workspace}/trainingJobs/{job}/checkpoints/{step}", "workspaces/w/trainingJobs/j/checkpoints/7"
    )
    assert step["step"] == "7"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "workspaces/default/datasets/",
        "workspaces/default/datasets/A",
        "workspaces/default/datasets/1a",
        "workspaces/default/datasets/a\n",
        "workspaces/default/datasets/../models/a",
        "workspaces/default/datasets/a/b",
        "workspaces/default/datasets/" + "a" * 64,
        "workspaces/default/models/a",
    ],
)
def test_a_bad_name_is_blamed_on_its_field(name: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(DATASET, name, field="parent")
    assert caught.value.reason == "NAME_MALFORMED"
    assert caught.value.violations[0].field == "parent"


def test_ids_are_given_or_made() -> None:
    assert choose_id("mine", "", "dataset") == "mine"
    assert choose_id("", "r1", "dataset") == choose_id("", "r1", "dataset") != choose_id("", "r2", "dataset")
    assert choose_id("", "", "dataset") != choose_id("", "", "dataset")
    parse("{id}", choose_id("", "", "training_job"))
    with pytest.raises(InvalidArgument) as caught:
        choose_id("Mine", "", "dataset")
    assert caught.value.violations[0].field == "dataset_id"


def test_times_are_rfc_3339_in_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", now())
