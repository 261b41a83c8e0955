"""`quartet quickstart-llava`: a real language model learns to see. The two stages of LLaVA (Liu et al. 2023) on real, small
parts, and the same questions before and after the second. Nothing but gRPC is used."""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from quartet.conversion.v1 import conversion_pb2
from quartet.inference.v1 import inference_pb2

from services.client.client import Client
from services.client.commands import connect
from services.client.commands.models import start_import
from services.client.easy_vqa import Drawing, captions, drawings, questions, write_tower
from services.client.quickstart import cancelling, convert, ended, finish, gguf, running_services, tell, work_folder
from services.client.show import out
from services.finetune.errors import Internal

QUESTIONS_EACH = 8
LEAST = 0.55
PROJECTOR = "multi_modal_projector"
COMMON: Mapping[str, Any] = {
    "method": "lora",
    "optim.name": "adamw",
    "data.max_length": 512,
    "schedule.batch_size": 1,
    "lora.modules_to_save": [PROJECTOR],
    "lora.dropout": 0.0,
    "report.log_every": 5,
}
PRETRAIN: Mapping[str, Any] = {
    **COMMON,
    "lora.targets": [],
    "optim.lr": 2e-3,
    "schedule.epochs": 2,
    "schedule.accumulate": 2,
}
"""The projector alone, on captions."""
FINETUNE: Mapping[str, Any] = {
    **COMMON,
    "lora.rank": 16,
    "lora.alpha": 32,
    "optim.lr": 1e-3,
    "optim.lr_pattern": {PROJECTOR: 5e-4},
    "schedule.epochs": 2,
    "schedule.accumulate": 2,
}
"""LoRA on the language model and the projector, on questions."""


def quickstart_llava(a: Namespace) -> int:
    began = time.monotonic()
    with ExitStack() as stack:
        if not (a.endpoint or os.environ.get("QUARTET_ENDPOINT")):
            a.endpoint = stack.enter_context(running_services(work_folder(a, stack)))
        client = stack.enter_context(connect(a))
        told = _Run(client, a.json, a.questions).all(a.images)
    told["wall_s"] = round(time.monotonic() - began, 1)
    # The services, and the workers and engines that they started, have ended by now.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    told["cpu_s"] = round(used.ru_utime + used.ru_stime, 1)
    if a.json:
        out(told)
    else:
        print(
            f"exact match on {a.questions} held-out questions: {told['untouched']:.1%} untouched, "
            f"{told['before']:.1%} after captions, {told['after']:.1%} after questions"
        )
        print(f"asked {told['question']!r}: {told['said_before']!r} before, {told['said_after']!r} after")
        print(f"{told['wall_s']} s, {told['cpu_s']} s of processors; the model is {told['model']}")
    before = max(told["untouched"], told["before"])
    good = told["after"] >= max(LEAST, 2 * before)
    if not good:
        print(f"error: {told['after']:.1%} are less than {LEAST:.0%}, or than twice {before:.1%}")
    return 0 if good else 1


class _Run:
    """One passage, in names of its own."""

    def __init__(self, client: Client, quiet: bool, asked: int) -> None:
        self._client, self._quiet = client, quiet
        self._tag = f"{int(time.time()):x}"
        self._held_out = drawings("test", asked, seed=1)

    def all(self, images: int) -> dict[str, Any]:
        base = self._base()
        self._say(f"asking {len(self._held_out)} questions")
        untouched, _ = self._ask(base)
        seen = drawings("train", images, seed=0)
        first = self._stage("captions", captions(seen), seen, base, PRETRAIN)
        self._say("asking again")
        before, said_before = self._ask(first)
        second = self._stage("questions", questions(seen, QUESTIONS_EACH), seen, first, FINETUNE)
        self._say("asking again")
        after, said_after = self._ask(second)
        question = self._held_out[0].talk[0][0]
        told = {
            "untouched": untouched,
            "before": before,
            "after": after,
            "question": question,
            "model": self._client.name("models", second),
        }
        return {**told, "said_before": said_before, "said_after": said_after}

    def _base(self) -> str:
        """SmolLM2 and DINOv2, assembled."""
        language, tower, base = (f"{name}-{self._tag}" for name in ("smollm2", "dinov2", "llava"))
        with tempfile.TemporaryDirectory() as folder:
            sources: Sequence[tuple[str, Callable[[], Path]]] = (
                (language, gguf),
                (tower, lambda: write_tower(Path(folder) / "dinov2-small")),
            )
            for name, source in sources:
                self._say(f"importing {name}")
                task = conversion_pb2.ImportTask(dtype="float32")
                job = start_import(self._client, str(source()), name, task, lambda done, total: None)
                finish(self._client, job, self._quiet)
        self._say("assembling them, with a fresh projector")
        whole = conversion_pb2.AssembleTask(
            language_model=self._client.name("models", language), vision_tower=self._client.name("models", tower)
        )
        convert(self._client, base, self._quiet, assemble=whole)
        return base

    def _stage(
        self,
        name: str,
        rows: Iterable[Mapping[str, Any]],
        seen: Sequence[Drawing],
        base: str,
        config: Mapping[str, Any],
    ) -> str:
        """A model tuned on `rows`: trained, made an adapter, merged."""
        self._say(f"uploading {name}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.json"
            path.write_text(json.dumps(list(rows)))
            images = Path(folder) / "images"
            images.mkdir()
            for drawing in seen:
                (images / drawing.image.name).symlink_to(drawing.image)
            revision = self._client.upload_dataset(f"{name}-{self._tag}", [path, images])
        self._say(f"training on {name}")
        job = self._client.train("", base, [revision.name], dict(config), job_id=f"{name}-{self._tag}")
        with cancelling(self._client, job.name):
            for event in self._client.watch(job.name):
                tell(event, self._quiet)
        done = ended(self._client, job.name)
        self._say("converting and merging")
        adapter, merged = f"{name}-{self._tag}-adapter", f"{name}-{self._tag}"
        convert(self._client, adapter, self._quiet, adapter=conversion_pb2.AdapterTask(checkpoint=done.result))
        task = conversion_pb2.MergeTask(adapter=self._client.name("models", adapter))
        convert(self._client, merged, self._quiet, merge=task)
        return merged

    def _ask(self, model: str) -> tuple[float, str]:
        """(part of the questions that are answered exactly, the first answer)."""
        endpoint = self._client.serve(model)
        try:
            with ThreadPoolExecutor(2) as pool:
                said = list(pool.map(lambda drawing: self._answer(endpoint.name, drawing), self._held_out))
        finally:
            self._client.inference.DeleteEndpoint(inference_pb2.DeleteEndpointRequest(name=endpoint.name))
        right = sum(text == drawing.talk[0][1] for text, drawing in zip(said, self._held_out, strict=True))
        if not said:
            raise Internal("nothing was asked", reason="METRICS_MISSING")
        return right / len(said), said[0]

    def _answer(self, endpoint: str, drawing: Drawing) -> str:
        question, image = drawing.talk[0][0], drawing.image.read_bytes()
        pieces = self._client.chat(endpoint, [("user", question)], images=[image], temperature=0.0, max_tokens=8)
        return "".join(piece.text for piece in pieces).strip()

    def _say(self, text: str) -> None:
        if not self._quiet:
            print(f"== {text}", flush=True)
