"""Errors of the services as notices."""

from __future__ import annotations

import gradio as gr
import pytest

from services.finetune.errors import InvalidArgument, NotFound, Violation
from services.gateway.pages.words import SHOWN, in_lines, in_words, short


def test_an_error_is_told_as_text() -> None:
    with pytest.raises(gr.Error) as caught, in_words():
        raise NotFound("no <b>model</b>", reason="MODEL_NOT_FOUND")
    assert caught.value.message == "no &lt;b&gt;model&lt;/b&gt;"
    assert caught.value.title == "Not found"


def test_fields_are_blamed_once_and_not_without_end() -> None:
    many = [Violation(f"f{n}", f"bad {n}") for n in range(SHOWN + 3)]
    lines = in_lines(InvalidArgument("f0: bad 0", reason="X", violations=many)).splitlines()
    assert lines[:2] == ["f0: bad 0", "f1: bad 1"] and lines[-1] == "… and 2 more" and len(lines) == SHOWN + 2


def test_short_names() -> None:
    assert short("workspaces/w/models/m") == "m"
