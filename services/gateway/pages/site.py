"""All pages, as one ASGI application behind the gate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when it is imported; whoever sets it otherwise means it.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from gradio.components import Navbar
from starlette.applications import Starlette
from starlette.middleware import Middleware

from services.gateway.pages import chat, compare, jobs, rows, train
from services.gateway.pages.choices import Choices
from services.gateway.pages.login import Gate
from services.gateway.reach import Reach

MAX_FILE = "20mb"
KEEP_FILES_S = 86_400
PAGES = (("Compare", "compare", compare), ("Train", "train", train), ("Jobs", "jobs", jobs), ("Rows", "rows", rows))
FONTS: dict[str, Any] = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
"""Those of the reader's machine: none is fetched."""


def site(reach: Reach, token: str, leaving: Callable[[], bool]) -> Starlette:
    """To be mounted at the root; its lifespan must be entered. For `token` and `leaving` see Gate."""
    choices = Choices(reach)
    with gr.Blocks(
        title="Quartet", fill_width=True, analytics_enabled=False, delete_cache=(3600, KEEP_FILES_S)
    ) as blocks:
        Navbar(main_page_name="Chat")
        chat.page(reach, choices, blocks)
    for name, path, module in PAGES:
        with blocks.route(name, path):
            Navbar(main_page_name="Chat")
            module.page(reach, choices, blocks)
    outer = Starlette(middleware=[Middleware(Gate, token, leaving)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SSR mode is not supported")  # nobody asks for it
        gr.mount_gradio_app(
            outer,
            blocks,
            path="/",
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=False,
            max_file_size=MAX_FILE,
            theme=gr.themes.Default(primary_hue="indigo", **FONTS),
            css_paths=Path(__file__).with_name("style.css"),
        )
    return outer
