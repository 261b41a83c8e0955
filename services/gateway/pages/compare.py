"""One question, two models, side by side."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from services.gateway.pages import talk
from services.gateway.pages.choices import Choices, choice
from services.gateway.pages.words import QUIET
from services.gateway.reach import Reach


def page(reach: Reach, choices: Choices, app: gr.Blocks) -> None:
    def ask(question: str, left: list[talk.Turn], right: list[talk.Turn]) -> tuple[str, Any, Any]:
        turn = {"role": "user", "content": question}
        return ("", [*left, turn], [*right, turn]) if question.strip() else ("", left, right)

    async def say(turns: list[talk.Turn], model: str, *values: Any) -> AsyncIterator[list[talk.Turn]]:
        if turns and turns[-1]["role"] == "user":
            async for said in talk.answer(reach, model, turns, *values):
                yield [*turns, *said]
        else:
            yield turns

    async def fill(left: str, right: str) -> Any:
        served = await choices.served()
        first, last = next(iter(served), None), served[-1] if served else None
        return (
            gr.Dropdown(choices=served, value=left if left in served else first),
            gr.Dropdown(choices=served, value=right if right in served else last),
        )

    with gr.Row():
        models = [choice(side) for side in ("Left", "Right")]
    with gr.Row():
        chats = [gr.Chatbot(show_label=False, height="52vh", buttons=["copy"]) for _ in models]
    with gr.Row():
        box = gr.Textbox(show_label=False, placeholder="Ask both…", scale=8, autofocus=True, submit_btn=True)
        stop = gr.Button("Stop", scale=1, min_width=90)
        clear = gr.Button("Clear", scale=1, min_width=90)
    with gr.Accordion("Settings of both", open=False):
        fields = talk.settings()

    asked = box.submit(ask, [box, *chats], [box, *chats], **QUIET)
    answers = [
        asked.then(
            say,
            [chat, model, *fields],
            chat,
            show_progress="hidden",
            concurrency_limit=None,
            api_name=f"compare_{side}",
        )
        for side, chat, model in zip(("left", "right"), chats, models, strict=True)
    ]
    stop.click(None, cancels=answers, api_visibility="private")
    clear.click(lambda: ([], []), None, chats, cancels=answers, api_visibility="private")
    for event in (app.load, models[0].focus, models[1].focus):
        event(fill, models, models, **QUIET)
