"""Start a run: a recipe, a model, data, the common settings. The plan is shown first, and what was planned is started."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from services.client.configs import read_options, recipe_config
from services.client.plans import lines
from services.finetune.config import RunConfig
from services.finetune.recipes.options import translate
from services.gateway.pages.choices import TUNABLE, Choices, choice
from services.gateway.pages.words import QUIET, in_words, short
from services.gateway.reach import Reach

KEYS = {
    "schedule.epochs": "Epochs",
    "schedule.max_steps": "Steps at most",
    "optim.lr": "Learning rate",
    "schedule.batch_size": "Batch size",
    "schedule.accumulate": "Accumulate",
    "data.max_length": "Tokens in a block",
    "lora.rank": "LoRA rank",
    "validation.ratio": "Rows held out (part)",
    "report.checkpoint_every": "Save every (steps)",
}
"""The settings with a field of their own; any other key of the config goes into the text below them."""
NO_PLAN = "<p>Plan first: it shows what the run will take, and nothing is started.</p>"


def page(reach: Reach, choices: Choices, app: gr.Blocks) -> None:
    def fill(recipe: str, model: str, request: gr.Request) -> Any:
        recipes, models = choices.recipes(), choices.models(TUNABLE)
        return (
            gr.Dropdown(choices=recipes, value=recipe or next(iter(recipes), None)),
            gr.Dropdown(choices=models, value=model or next(iter(models), None)),
            gr.Dropdown(choices=choices.datasets()),
        )

    def defaults(recipe: str, held: str) -> Any:
        """The recipe's own values of the fields; once, since a browser may tell of one change twice, and meanwhile somebody
        may have written into them."""
        if recipe == held:
            return gr.skip()
        if not recipe:
            return [None] * len(KEYS) + [recipe]
        with in_words():
            config = recipe_config(reach.client, recipe)
        return [*(_value(config, key) for key in KEYS), recipe]

    def plan(recipe: str, model: str, datasets: list[str], name: str, prompts: str, more: str, *values: Any) -> Any:
        client = reach.client
        with in_words():
            config = recipe_config(client, recipe)
            options = {k: v for k, v in zip(KEYS, values, strict=True) if v is not None and v != _value(config, k)}
            asked = [line.strip() for line in prompts.splitlines() if line.strip()]
            if asked:
                options |= {"report.prompts": asked, "report.sample_every": config.report.sample_every or 10}
            options |= read_options([line.strip() for line in more.splitlines() if line.strip()])
            ordered: dict[str, Any] = {
                "recipe": recipe,
                "base": model,
                "datasets": datasets,
                "overrides": translate(config, options),
            }
            job = client.train(**ordered, job_id=name, validate_only=True)
        shown = html.escape("\n".join(lines(job)))
        return f'<pre class="plan">{shown}</pre>', {**ordered, "job_id": name}, gr.Button(interactive=True)

    def start(ordered: dict[str, Any] | None) -> Any:
        if ordered is None:
            raise gr.Error("Plan first.", print_exception=False)
        with in_words():
            job = short(reach.client.train(**ordered).name)
        link = f'<p>Started: <a href="/jobs?job={job}">{job}</a></p>'
        return link, None, gr.Button(interactive=False)

    def changed() -> Any:
        return NO_PLAN, None, gr.Button(interactive=False)

    ordered, held = gr.State(None), gr.State("")
    with gr.Row(equal_height=False):
        with gr.Column():
            recipe = choice("Recipe", info="model, dataset and method; any base may be tuned by it")
            model = choice("Base model")
            datasets = choice("Datasets", multiselect=True, info="their newest revisions")
            name = gr.Textbox(label="Name of the job", placeholder="made by the service if empty")
            prompts = gr.Textbox(
                label="Questions to ask it meanwhile", placeholder="one a line, as: Who are you?", lines=2
            )
        with gr.Column():
            with gr.Row():
                values = [gr.Number(label=told, min_width=170, step=_step(key)) for key, told in KEYS.items()]
            more = gr.Textbox(label="Further settings", placeholder="KEY=VALUE, one a line, as lora.alpha=32", lines=3)
    with gr.Row():
        look = gr.Button("Plan", variant="secondary")
        go = gr.Button("Start", variant="primary", interactive=False)
    shown = gr.HTML(NO_PLAN, elem_id="plan")

    fields: list[Any] = [recipe, model, datasets, name, prompts, more, *values]
    app.load(fill, [recipe, model], [recipe, model, datasets], **QUIET)
    recipe.change(defaults, [recipe, held], [*values, held], **QUIET)
    gr.on([f.change for f in fields], changed, None, [shown, ordered, go], **QUIET)
    look.click(plan, fields, [shown, ordered, go], api_name="plan", concurrency_limit=None)
    go.click(start, ordered, [shown, ordered, go], api_visibility="private", concurrency_limit=None)


def _value(config: RunConfig, key: str) -> Any:
    section, _, last = key.partition(".")
    return getattr(getattr(config, section), last)


def _step(key: str) -> float:
    """What the arrows of a number's field add; without decimals the field would take whole numbers only."""
    return {"optim.lr": 1e-5, "validation.ratio": 0.01}.get(key, 1)
