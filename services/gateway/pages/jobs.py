"""Training jobs: the loss as it falls, what the model says meanwhile, and pause, resume, cancel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import gradio as gr
from quartet.training.v1 import training_pb2 as pb

from services.gateway.pages.choices import Choices, choice
from services.gateway.pages.story import Story, heading
from services.gateway.pages.words import QUIET, in_words
from services.gateway.reach import Reach

LOOK_S = 1.0
"""Between two drawings of a job that goes on."""


def page(reach: Reach, choices: Choices, app: gr.Blocks) -> None:
    async def follow(name: str) -> AsyncIterator[tuple[Any, ...]]:
        """(heading, curve, answers, lines) whenever something happened, to the job's end."""
        if not name:
            return
        full, story = reach.client.name("trainingJobs", name), Story()
        with in_words():
            job = await asyncio.to_thread(reach.client.job, full)
            listening = asyncio.create_task(_listen(reach, full, story))
            try:
                while True:
                    ended = listening.done()
                    yield heading(job, story.last), story.curve(), story.answers(), "\n".join(reversed(story.lines))
                    if ended:
                        listening.result()
                        return
                    await asyncio.wait({listening}, timeout=LOOK_S)
                    job = await asyncio.to_thread(reach.client.job, full)
            finally:
                listening.cancel()
                with suppress(BaseException):
                    await listening

    def fill(name: str, request: gr.Request) -> Any:
        jobs = choices.jobs()
        wanted = name or request.query_params.get("job", "")
        told = None if jobs else "none yet: Train starts one"
        return gr.Dropdown(choices=jobs, value=wanted if wanted in jobs else next(iter(jobs), None), info=told)

    def doing(act: Callable[[str], pb.TrainingJob], said: str) -> Callable[[str], None]:
        def do(name: str) -> None:
            if name:
                with in_words():
                    act(reach.client.name("trainingJobs", name))
                gr.Info(said, duration=4)

        return do

    with gr.Row(equal_height=False):
        job = choice("Job", scale=1, min_width=280)
        with gr.Column(scale=2):
            told = gr.HTML(padding=False)
            with gr.Row():
                verbs = [gr.Button(verb, size="sm", min_width=90) for verb in ("Pause", "Resume", "Cancel")]
    curve = gr.HTML(elem_id="curve")
    with gr.Row(equal_height=False):
        with gr.Column():
            gr.Markdown("### Answers meanwhile")
            answers = gr.HTML()
        lines = gr.Textbox(label="What happened, newest first", lines=12, max_lines=12, interactive=False)

    shown = [told, curve, answers, lines]
    follower: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "always_last"}
    app.load(fill, job, job, **QUIET)
    job.focus(fill, job, job, **QUIET)
    job.change(follow, job, shown, api_name="follow", **follower)
    client = reach.client
    acts = (
        (client.pause, "asked to save and stop"),
        (client.resume, "goes on from its newest checkpoint"),
        (client.cancel, "asked to end; its last checkpoint is kept"),
    )
    for button, (act, said) in zip(verbs, acts, strict=True):
        button.click(doing(act, said), job, api_visibility="private")


async def _listen(reach: Reach, name: str, story: Story) -> None:
    async for event in reach.training.watch(name):
        story.add(event)
