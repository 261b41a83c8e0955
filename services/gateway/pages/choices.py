"""What the services hold, as the choices of a field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from quartet.conversion.v1 import conversion_pb2
from quartet.datasets.v1 import datasets_pb2
from quartet.training.v1 import training_pb2

from services.client.retry import pages
from services.gateway.pages.words import in_words, short
from services.gateway.reach import Reach
from services.gateway.wire import model_object

TUNABLE = (conversion_pb2.Model.BASE, conversion_pb2.Model.MERGED)
WHOLE = (*TUNABLE, conversion_pb2.Model.QUANTIZED)
MOST_JOBS = 200


def choice(label: str, choices: Sequence[str] = (), **more: Any) -> gr.Dropdown:
    """A field for one of a list that is asked for later. Any other text may be given too: the services judge it, and a
    recipe need not be listed to be one."""
    return gr.Dropdown(label=label, choices=list(choices), allow_custom_value=True, **more)


class Choices:
    """Lists of short names, asked for whenever a page is shown."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach

    async def served(self) -> list[str]:
        """What answers, as OpenAI's API names it: an endpoint, or endpoint:alias."""
        with in_words():
            return [model_object(s)["id"] for s in await self._reach.inference.served()]

    def models(self, kinds: tuple[conversion_pb2.Model.Kind.ValueType, ...] = WHOLE) -> list[str]:
        client = self._reach.client
        with in_words():
            listed = pages(
                client.conversion.ListModels, conversion_pb2.ListModelsRequest(parent=client.parent), "models"
            )
            return [short(m.name) for m in listed if m.kind in kinds]

    def datasets(self) -> list[str]:
        """Those with a revision, newest first."""
        client = self._reach.client
        with in_words():
            request = datasets_pb2.ListDatasetsRequest(parent=client.parent)
            return [
                short(d.name) for d in pages(client.datasets.ListDatasets, request, "datasets") if d.latest_revision
            ]

    def templates(self) -> list[str]:
        with in_words():
            listed = self._reach.client.datasets.ListTemplates(datasets_pb2.ListTemplatesRequest())
            return [t.name for t in listed.templates]

    def recipes(self) -> list[str]:
        """Those that were trained here come first."""
        with in_words():
            listed = pages(self._reach.client.training.ListRecipes, training_pb2.ListRecipesRequest(), "recipes")
            found = sorted((not r.tested, r.name) for r in listed if r.method != "deepspeed")
        return [short(name) for _, name in found]

    def jobs(self) -> list[str]:
        """The newest training jobs."""
        client = self._reach.client
        with in_words():
            request = training_pb2.ListTrainingJobsRequest(parent=client.parent, page_size=MOST_JOBS)
            return [short(j.name) for j in client.training.ListTrainingJobs(request).training_jobs]
