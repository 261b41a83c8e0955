"""Ids of requests: what may stand in a log line goes along, anything else does not."""

from __future__ import annotations

import pytest
from hypothesis import given as fed
from hypothesis import strategies as st

from services.common.requests import KEY, along, given, given_or_made


def test_an_id_goes_along() -> None:
    assert given([("a", "b"), *along("req-1.2:x/y+z=")]) == "req-1.2:x/y+z="
    assert given(None) == given([("a", "b")]) == "" and along("") == ()
    assert given_or_made("mine") == "mine"


@pytest.mark.parametrize("bad", ["", "a b", "a\nERROR forged", "x" * 65, "é", "\x1b[31m"])
def test_what_a_log_should_not_hold_is_no_id(bad: str) -> None:
    assert given([(KEY, bad)]) == ""
    assert len(given_or_made(bad)) == 32 and given_or_made(bad) != given_or_made(bad)


@fed(st.text())
def test_ids_are_one_line(text: str) -> None:
    assert len(given([(KEY, text)]).splitlines()) <= 1
