"""Chat with an endpoint, or with one of its adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from services.gateway.pages import talk
from services.gateway.pages.choices import Choices, choice
from services.gateway.pages.words import QUIET
from services.gateway.reach import Reach


def page(reach: Reach, choices: Choices, app: gr.Blocks) -> None:
    async def say(
        message: dict[str, Any], history: list[talk.Turn], model: str, *values: Any
    ) -> AsyncIterator[list[talk.Turn]]:
        async for said in talk.answer(reach, model, [*history, talk.turn(message)], *values):
            yield said

    async def fill(model: str) -> Any:
        served = await choices.served()
        return gr.Dropdown(choices=served, value=model if model in served else next(iter(served), None))

    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_id="settings"):
            model = choice("Model")
            fields = talk.settings()
        with gr.Column(scale=3):
            gr.ChatInterface(
                say,
                chatbot=gr.Chatbot(show_label=False, height="70vh", buttons=["copy"]),
                multimodal=True,
                textbox=gr.MultimodalTextbox(
                    show_label=False,
                    placeholder="Say something…",
                    sources=["upload"],
                    file_types=["image"],
                    file_count="multiple",
                    submit_btn=True,
                    stop_btn=True,
                    elem_id="say",
                ),
                additional_inputs=[model, *fields],
                api_name="chat",
                show_progress="hidden",
                concurrency_limit=None,
            )
    app.load(fill, model, model, **QUIET)
    model.focus(fill, model, model, **QUIET)
