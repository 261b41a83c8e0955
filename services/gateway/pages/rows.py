"""Rows of a dataset as training sees them: what is learned is coloured."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr
from quartet.datasets.v1 import datasets_pb2 as pb

from services.gateway.pages.choices import Choices, choice
from services.gateway.pages.words import QUIET, in_words
from services.gateway.reach import Reach

OWN = "the model's own"
LEGEND = '<p class="legend"><mark>learned</mark> <span>read, not learned</span></p>'


def page(reach: Reach, choices: Choices, app: gr.Blocks) -> None:
    def preview(
        dataset: str, model: str, template: str, system: str, start: float, count: float, max_length: float
    ) -> str:
        if not dataset or not model:
            raise gr.Error("Choose a dataset, and the model whose tokenizer reads it.", print_exception=False)
        client = reach.client
        request = pb.PreviewRowsRequest(
            name=client.revision(dataset),
            model=client.name("models", model),
            template="" if template == OWN else template,
            system=system,
            start_row=int(start or 0),
            row_count=int(count or 0),
            max_length=int(max_length or 0),
        )
        with in_words():
            shown = client.datasets.PreviewRows(request)
        rows = "".join(map(drawn, shown.rows))
        return f"{LEGEND}<p>Template: {html.escape(shown.template)}</p>{rows or '<p>There is no such row.</p>'}"

    def fill(dataset: str, model: str) -> Any:
        datasets, models = choices.datasets(), choices.models()
        return (
            gr.Dropdown(choices=datasets, value=dataset or next(iter(datasets), None)),
            gr.Dropdown(choices=models, value=model or next(iter(models), None)),
            gr.Dropdown(choices=[OWN, *choices.templates()]),
        )

    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=260):
            dataset = choice("Dataset", info="its newest revision")
            model = choice("Model", info="whose tokenizer")
            template = choice("Template", choices=[OWN], value=OWN)
            system = gr.Textbox(label="System", placeholder="for rows that have none")
            with gr.Row():
                start = gr.Number(label="First row", value=0, minimum=0, precision=0, min_width=80)
                count = gr.Number(label="Rows", value=5, minimum=1, maximum=100, precision=0, min_width=80)
            max_length = gr.Number(label="Cut at tokens", info="0: not at all", value=0, minimum=0, precision=0)
            show = gr.Button("Show", variant="primary")
        with gr.Column(scale=3):
            shown = gr.HTML(LEGEND, elem_id="rows")
    show.click(
        preview, [dataset, model, template, system, start, count, max_length], shown, api_name="preview",
        concurrency_limit=None,
    )  # fmt: skip
    app.load(fill, [dataset, model], [dataset, model, template], **QUIET)


def drawn(row: pb.PreviewRow) -> str:
    """A row as HTML."""
    told = f"{row.file} row {row.row}: {len(row.token_ids)} tokens, {sum(row.loss_mask)} learned"
    told += f", {row.truncated_tokens} cut off" if row.truncated_tokens else ""
    pieces = "".join(
        f"<mark>{html.escape(piece.text)}</mark>" if piece.trained else f"<span>{html.escape(piece.text)}</span>"
        for piece in row.pieces
    )
    return f'<section class="told"><h4>{html.escape(told)}</h4><pre>{pieces}</pre></section>'
