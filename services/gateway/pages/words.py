"""What went wrong, told on the page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from services.finetune.errors import QuartetError

SHOWN = 10
NOTICE_S = 20.0
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Of an event that only fills a page in."""


@contextmanager
def in_words() -> Iterator[None]:
    """An error of the services becomes a notice. A defect is logged, and told as one."""
    try:
        yield
    except QuartetError as error:
        raise told(error) from error


def told(error: QuartetError) -> gr.Error:
    """The notice; what the error says is text, and the notice would take it for HTML."""
    said = "<br>".join(map(html.escape, in_lines(error).splitlines()))
    return gr.Error(said, duration=NOTICE_S, title=error.code.replace("_", " ").capitalize(), print_exception=False)


def in_lines(error: QuartetError) -> str:
    """The error, and a line for each field to blame that it does not name itself."""
    blamed = [f"{v.field}: {v.message}" for v in error.violations if v.message not in error.message]
    left = [f"… and {len(blamed) - SHOWN} more"] if len(blamed) > SHOWN else []
    return "\n".join([error.message, *blamed[:SHOWN], *left])


def short(name: str) -> str:
    """The last part of a resource's name."""
    return name.rpartition("/")[2]
