"""What the model says to a run's prompts, greedily; to some of them beside an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from services.finetune.config import RunConfig
from services.finetune.errors import InvalidArgument, nearest
from services.finetune.formats import IMAGE, Message
from services.finetune.orders import ArtifactRef
from services.finetune.store import Store
from services.finetune.store.artifacts import load
from services.finetune.templates import Template, to_prompt_ids
from services.finetune.tokenizer import Tokenizer
from services.finetune.train.model import computing
from services.finetune.vision import ImageForm, expand, pixels


def shown(
    config: RunConfig, datasets: Sequence[ArtifactRef], store: Store, form: ImageForm | None, folder: Path
) -> list[Any]:
    """Pixels for each prompt, None without an image: of the datasets' files that `report.images` names. InvalidArgument
    (CONFIG_VALUE_INVALID)."""
    paths, prompts = config.report.images, config.report.prompts
    if not paths:
        return [None] * len(prompts)
    if form is None:
        raise _invalid("the base model sees no images")
    files = {f.path: f.digest for d in datasets for f in load(store, d.digest).files}
    found = []
    for n, path in enumerate(paths * len(prompts) if len(paths) == 1 else paths):
        if path and path not in files:
            raise _invalid(f"no dataset of the job holds a file {path!r}{nearest(path, list(files))}")
        if path:
            store.fetch_blob(files[path], folder / str(n))
        found.append(torch.from_numpy(pixels(folder / str(n), form))[None] if path else None)
    return found


class Answers:
    """`images` are pixels for each prompt, or None. `together`: all ranks answer, and none may leave early."""

    def __init__(
        self,
        model: Any,
        config: RunConfig,
        template: Template,
        tokenizer: Tokenizer,
        images: Sequence[Any],
        form: ImageForm | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._config, self._template, self._tokenizer = model, config, template, tokenizer
        self._images, self._form = images, form
        self._device, self._dtype = device, dtype

    def ask(self, stopped: Callable[[], bool], together: bool) -> Iterator[tuple[str, str]]:
        """(prompt, answer) of each; nothing more once `stopped`, for half an answer is none."""
        self._model.eval()
        stopping: Any = [lambda *_: stopped() and not together]
        for prompt, image in zip(self._config.report.prompts, self._images, strict=True):
            ids = self._ids(prompt, image is not None)
            prompt_BL = torch.tensor([ids], device=self._device)
            given = {} if image is None else {"pixel_values": image.to(self._device)}
            with torch.no_grad(), computing(self._device, self._dtype):
                out_BL = self._model.generate(
                    input_ids=prompt_BL,
                    attention_mask=torch.ones_like(prompt_BL),
                    max_new_tokens=self._config.report.sample_tokens,
                    do_sample=False,
                    use_cache=True,
                    synced_gpus=together,
                    eos_token_id=list(self._tokenizer.eos_ids),
                    pad_token_id=(self._tokenizer.eos_ids or (0,))[0],
                    stopping_criteria=stopping,
                    **given,
                )
            if stopped() and not together:
                return
            yield prompt, self._tokenizer.decode(out_BL[0, len(ids) :].tolist())

    def _ids(self, prompt: str, image: bool) -> list[int]:
        system = self._config.report.system or self._config.data.system
        asked = f"{IMAGE}\n{prompt}" if image and IMAGE not in prompt else prompt
        ids = to_prompt_ids(self._template, self._tokenizer, [Message("user", asked)], system, images=image)
        return expand(ids, self._form) if self._form else ids


def _invalid(why: str) -> InvalidArgument:
    return InvalidArgument(
        f"config key 'report.images': {why}", reason="CONFIG_VALUE_INVALID", metadata={"key": "report.images"}
    )
