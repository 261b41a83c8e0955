"""python -m tests.bench.llava_full [VARIANT …]: what the quickstart's pair answers once it has learned from all of easy-VQA.

SmolLM2-135M and DINOv2 ViT-S, learning in the two stages of services/client/quickstart_llava.py, by workers over a store.
Variants learn side by side. They are judged by questions about images that none of them has learned from, and the best
is asked all questions of the test set, whose images are others again. An answer is right if it is the expected text.
Needs what `make quickstart-llava` installs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from services.client.easy_vqa import Drawing, captions, drawings, questions, write_tower
from services.client.quickstart import gguf
from services.client.quickstart_llava import FINETUNE, PRETRAIN, PROJECTOR, QUESTIONS_EACH
from services.finetune.formats import IMAGE, Message
from services.finetune.orders import AdapterTask, ArtifactRef, AssembleTask, ImportTask, MergeTask
from services.finetune.store import Store, open_store
from services.finetune.store.artifacts import File, Manifest, load, materialise, publish
from services.finetune.templates import load_template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from services.finetune.vision import ImageForm, expand, pixels, read_form
from services.inference.engines.port import Picture, Sampling
from tests.bench.jobs import GPU, convert, job, order

Rows = Iterable[Mapping[str, Any]]
FAST: Mapping[str, Any] = {"data.max_length": 1024, "schedule.batch_size": 8, "schedule.accumulate": 1}
PACE: Mapping[str, Any] = {"quant.bits": 0, "report.log_every": 50}
MOST_TOKENS = 8
AT_ONCE = 256 if GPU else 16
"""Questions that are answered together."""
JUDGED = 1500
"""Questions to judge a variant by."""
ENGINE = 100
"""Questions that the engine of endpoints is asked too, one by one."""


@dataclass(frozen=True, slots=True)
class Variant:
    rows: Callable[[list[Drawing]], Rows]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """From the quickstart's second stage."""
    images: int = 0
    """Learn from so many; 0 is all."""


def talks(found: list[Drawing]) -> Rows:
    return questions(found, QUESTIONS_EACH)


def single(found: list[Drawing]) -> Rows:
    """Each question in a row of its own."""
    return questions([dataclasses.replace(d, talk=(said,)) for d in found for said in d.talk], 1)


VARIANTS: Mapping[str, Variant] = {
    "quick": Variant(talks, images=160),
    "more": Variant(talks, images=800),
    "single": Variant(single, {"optim.lr": 3e-4, "optim.lr_pattern": {PROJECTOR: 3e-4}, **FAST}),
}


class Pair:
    """The two models in a store, and what is made of them."""

    def __init__(self, store: Store, options: argparse.Namespace) -> None:
        self._store, self._options = store, options
        seen = drawings("train", options.images, seed=0)
        self.learned = seen[: -options.judged]
        self.judged = _asked(seen[-options.judged :], options.questions or JUDGED)
        self.test = _asked(drawings("test", 10_000, seed=1), options.questions)
        self.told: dict[str, Any] = {"variants": {}}
        self._asking = threading.Lock()

    def base(self) -> str:
        """Assembled, with a projector that has learned nothing."""
        with tempfile.TemporaryDirectory() as folder:
            language = self._convert("language", import_model=ImportTask(local_path=str(gguf()), dtype="float32"))
            tower = write_tower(Path(folder) / "dinov2-small")
            seeing = self._convert("tower", import_model=ImportTask(local_path=str(tower), dtype="float32"))
        task = AssembleTask(language_model=_ref(language), vision_tower=_ref(seeing))
        return self._convert("base", assemble=task)

    def learn(self, name: str, base: str, rows: Rows, images: list[Drawing], changes: Mapping[str, Any]) -> str:
        """The merged model."""
        began = time.monotonic()
        ended = job(self._store, order(base, self._put(rows, images), changes), f"jobs/{name}")
        peak = next((line for line in reversed(ended.logs) if line.startswith("peak memory")), "")
        ways = [line for line in ended.logs if line.startswith("gradients by")]
        took = f"{time.monotonic() - began:.0f} s, loss {ended.values('loss')[-1]:.3f}"
        print(f"{name}: {took}, {peak}, {ways}", flush=True)
        adapter = self._convert(f"{name}-adapter", adapter=AdapterTask(checkpoint=_ref(ended.checkpoint)))
        return self._convert(f"{name}-merged", merge=MergeTask(adapter=_ref(adapter), base=_ref(base), report="never"))

    def ask(self, name: str, model: str, asked: Sequence[Asked], engine: int = 0) -> float:
        """The part that is answered rightly; told and kept."""
        with self._asking, tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            whole = materialise(self._store, load(self._store, model), Path(folder) / "model")
            said = Answerer(whole).say(asked)
            right = [text == one.answer for text, one in zip(said, asked, strict=True)]
            part = sum(right) / len(right)
            open_ones = [good for good, one in zip(right, asked, strict=True) if one.answer not in ("yes", "no")]
            took, apart = time.monotonic() - began, f"{np.mean(open_ones):.2%} of {len(open_ones)} not by yes or no"
            print(f"{name}: {part:.2%} of {len(asked)} right, {apart}; {took:.0f} s", flush=True)
            self.told["variants"][name] = {"right": part, "asked": len(asked)}
            if engine:
                same = sum(a == b for a, b in zip(by_engine(whole, asked[:engine]), said, strict=False))
                print(
                    f"{name}: the engine of endpoints says the same to {same} of {min(engine, len(asked))}", flush=True
                )
        if self._options.json:
            Path(self._options.json).write_text(json.dumps(self.told))
        return part

    def _convert(self, name: str, **task: Any) -> str:
        return convert(self._store, f"jobs/{name}", **task)

    def _put(self, rows: Rows, images: list[Drawing]) -> str:
        listed = list(rows)
        blob = self._store.put_blob(json.dumps(listed).encode())
        files = [File("rows.json", blob.digest, blob.size)]
        for drawing in images:
            one = self._store.put_file(drawing.image)
            files.append(File(f"images/{drawing.image.name}", one.digest, one.size))
        meta = {"format": "llava", "rows": len(listed)}
        return publish(self._store, Manifest("dataset", tuple(sorted(files, key=lambda f: f.path)), (), meta))


@dataclass(frozen=True, slots=True)
class Asked:
    image: Path
    question: str
    answer: str


def _asked(found: list[Drawing], most: int) -> list[Asked]:
    listed = [Asked(d.image, question, answer) for d in found for question, answer in d.talk]
    # Spread over the images.
    return listed[:: max(1, len(listed) // most)][:most] if most else listed


class Prompts:
    """A model's prompts, as endpoints make them."""

    def __init__(self, folder: Path) -> None:
        form = read_form(folder)
        assert form is not None
        self.form: ImageForm = form
        self.tokenizer = Tokenizer.from_files(folder)
        self._template = load_template("tokenizer", self.tokenizer)

    def ids(self, question: str) -> list[int]:
        said = [Message("user", f"{IMAGE}\n{question}")]
        return expand(to_prompt_ids(self._template, self.tokenizer, said, images=True), self.form)


class Answerer:
    """transformers' own generate, greedily, of many prompts that are of one length."""

    def __init__(self, folder: Path) -> None:
        self._prompts = Prompts(folder)
        self._device = torch.device("cuda" if GPU else "cpu")
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        self._model = model.to(self._device).eval()

    def say(self, asked: Sequence[Asked]) -> list[str]:
        ids = [self._prompts.ids(one.question) for one in asked]
        lengths: dict[int, list[int]] = {}
        for n, one in enumerate(ids):
            lengths.setdefault(len(one), []).append(n)
        said = [""] * len(asked)
        with ThreadPoolExecutor(8) as pool:
            images = sorted({one.image for one in asked})
            seen = dict(zip(images, pool.map(lambda path: pixels(path, self._prompts.form), images), strict=True))
        for numbers in lengths.values():
            for at in range(0, len(numbers), AT_ONCE):
                some = numbers[at : at + AT_ONCE]
                texts = self._some([ids[n] for n in some], np.stack([seen[asked[n].image] for n in some]))
                for n, text in zip(some, texts, strict=True):
                    said[n] = text
        return said

    @torch.inference_mode()
    def _some(self, ids: list[list[int]], pixels_N3SS: Any) -> list[str]:
        ends = self._prompts.tokenizer.eos_ids
        prompt_NL = torch.tensor(ids, device=self._device)
        out_NL = self._model.generate(
            input_ids=prompt_NL,
            attention_mask=torch.ones_like(prompt_NL),
            pixel_values=torch.from_numpy(pixels_N3SS).to(self._device),
            max_new_tokens=MOST_TOKENS,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=ends[0],
        )
        rows = (row.tolist() for row in out_NL[:, prompt_NL.shape[1] :])
        return [self._prompts.tokenizer.decode(_until(row, ends)).strip() for row in rows]


def by_engine(folder: Path, asked: Sequence[Asked]) -> list[str]:
    """What the transformers engine of endpoints says."""
    from services.inference.engines.transformers import TransformersEngine

    engine, prompts = TransformersEngine(folder, {}, "float32", 0), Prompts(folder)
    greedy = Sampling(0, 1, 0, MOST_TOKENS, 1, None, prompts.tokenizer.eos_ids)

    async def one(said: Asked) -> str:
        data = said.image.read_bytes()
        shown = [Picture(hashlib.sha256(data).hexdigest(), data)]
        ids = [i async for step in engine.generate(prompts.ids(said.question), greedy, "", shown) for i in step.ids]
        return prompts.tokenizer.decode(ids).strip()

    async def every() -> list[str]:
        return [await one(said) for said in asked]

    return asyncio.run(every())


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))]


def _ref(digest: str) -> ArtifactRef:
    return ArtifactRef(name="made", digest=digest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=["more", "single"], help=", ".join(VARIANTS))
    parser.add_argument("--images", type=int, default=4000, help="of the training set")
    parser.add_argument("--judged", type=int, default=400, help="of these, held out to choose a variant by")
    parser.add_argument("--questions", type=int, default=0, help="ask no more than so many; 0 asks all")
    parser.add_argument("--store", default="", help="a folder that keeps the models")
    parser.add_argument("--json", default="", help="a file for all numbers")
    options = parser.parse_args()
    chosen = {name: VARIANTS[name] for name in options.variants}
    with tempfile.TemporaryDirectory() as home:
        pair = Pair(open_store(Path(options.store or f"{home}/store").absolute().as_uri()), options)
        print(
            f"{len(pair.learned)} images to learn from, {len(pair.judged)} and {len(pair.test)} questions", flush=True
        )
        base = pair.base()
        pair.ask("untouched", base, pair.judged)
        first = pair.learn("captions", base, captions(pair.learned), pair.learned, {**PRETRAIN, **PACE})
        pair.ask("captions", first, pair.judged)

        def run(name: str) -> tuple[float, str]:
            one = chosen[name]
            seen = pair.learned[: one.images or None]
            model = pair.learn(name, first, one.rows(seen), seen, {**FINETUNE, **PACE, **one.changes})
            return pair.ask(name, model, pair.judged), model

        with ThreadPoolExecutor(len(chosen)) as pool:
            found = dict(zip(chosen, pool.map(run, chosen), strict=True))
        best = max(found, key=lambda name: found[name][0])
        pair.ask(f"{best}, test set", found[best][1], pair.test, ENGINE)


if __name__ == "__main__":
    main()
