"""The transformers engine: any causal model on CPU or GPU, adapters by PEFT, one forward pass at a time.

Each request has a thread and a key-value cache of its own; a fair queue gives each the model for one step, so a long
answer or prompt delays a short one by a step and not by its length.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar

from services.finetune.config import QuantConfig, from_json
from services.finetune.errors import FailedPrecondition
from services.finetune.modules import auto_class, is_llava
from services.finetune.train.model import keep_layout, quantisation, read_config
from services.inference.engines.forms import Follower, Vocabulary
from services.inference.engines.port import Likely, Picture, Sampling, Step, no_embeddings
from services.inference.engines.sight import Sight

MOST_ADAPTERS = 64
MOST_ANSWERS = 32
"""Answers at a time: each has keys and values of its own, and together they are no faster."""
PREFILL = 1024
"""Tokens of a prompt that are read in one step."""


class TransformersEngine:
    """See Engine. `adapters` are folders in PEFT layout by key."""

    def __init__(self, folder: Path, adapters: Mapping[str, Path], dtype: str, bits: int) -> None:
        model = _load(folder, getattr(torch, dtype), bits)
        text = model.config.get_text_config()
        self._sight = Sight(folder) if is_llava(model.config.to_dict()) else None
        self.context_length = int(getattr(text, "max_position_embeddings", 0) or 4096)
        self.vocabulary = int(text.vocab_size)
        self.most_adapters, self.most_answers = MOST_ADAPTERS, MOST_ANSWERS
        self._model = model.eval()
        self._device = next(model.parameters()).device
        self._vocabulary = functools.lru_cache(4)(lambda ends: Vocabulary(folder, self.vocabulary, ends))
        self._turns = FairLock()
        self._adapted = False
        self._adapter: str | None = None  # which one the layers are set to; nobody knows at first
        for key, path in list(adapters.items())[:MOST_ADAPTERS]:
            self.load(key, path)
        # It takes a second or more, which the first adapter that is loaded beside answers should not wait for.
        threading.Thread(target=importlib.import_module, args=("peft",), name="peft", daemon=True).start()

    def load(self, key: str, folder: Path) -> None:
        with self._turns.turn():
            self._model = _with_adapter(self._model, self._adapted, key, folder).eval()
            self._adapted, self._adapter = True, None

    def unload(self, key: str) -> None:
        with self._turns.turn():
            if set(self._model.peft_config) == {_inner(key)}:
                # PEFT cannot answer without any adapter: take its layers out again.
                self._model, self._adapted = self._model.unload(), False
            else:
                other = next(name for name in self._model.peft_config if name != _inner(key))
                self._model.set_adapter(other, inference_mode=True)  # PEFT warns of deleting the active one
                self._model.delete_adapter(_inner(key))
            self._adapter = None

    def cache_use(self) -> float:
        return math.nan  # each answer's cache grows as it needs

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        raise no_embeddings()

    def alive(self) -> bool:
        return True  # it has no life beside this process

    def close(self) -> None:
        pass

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, adapter: str, images: Sequence[Picture] = ()
    ) -> AsyncIterator[Step]:
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step | Exception] = asyncio.Queue()
        gone = threading.Event()

        def work() -> None:
            try:
                for step in self._steps(ids, sampling, adapter, images):
                    if gone.is_set():
                        return
                    loop.call_soon_threadsafe(steps.put_nowait, step)
            except Exception as error:
                # At the server's end the loop may be closed before the last threads notice.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(steps.put_nowait, error)

        threading.Thread(target=work, name="generate", daemon=True).start()
        try:
            while True:
                step = await steps.get()
                if isinstance(step, Exception):
                    raise step
                yield step
                if step.finish:
                    return
        finally:
            gone.set()

    def _steps(self, ids: Sequence[int], sampling: Sampling, adapter: str, images: Sequence[Picture]) -> Iterator[Step]:
        """An answer token by token. While a long prompt is read there are empty steps, so that it can be cut short."""
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        follower = Follower(self._vocabulary(sampling.eos_ids), sampling.form) if sampling.form else None
        cache = DynamicCache(config=self._model.config)
        feed, said = list(ids), list[int]()
        features = list[Tensor]()
        for picture in images:
            features += self._look(picture, adapter)
            yield Step([])
        while len(feed) > PREFILL:
            self._forward(feed[:PREFILL], cache, adapter, features)
            feed = feed[PREFILL:]
            yield Step([])
        for n in range(sampling.max_tokens):
            logits = self._forward(feed, cache, adapter, features)
            token = choose(follower.allow(logits) if follower else logits, ids, said, sampling, generator)
            if token in sampling.eos_ids:
                yield Step([], "stop")
                return
            if follower:
                follower.push(token)
            said.append(token)
            feed = [token]
            likely = [] if sampling.logprobs is None else [how_likely(logits, token, sampling.logprobs)]
            yield Step([token], "length" if n + 1 == sampling.max_tokens else "", likely)

    def _look(self, picture: Picture, adapter: str) -> Tensor:
        """What the model makes of an image, a vector for each of its tokens."""
        assert self._sight is not None  # whoever asks knows by the form of the model's images
        known = self._sight.known(picture.digest, adapter)
        if known is not None:
            return known
        pixels = self._sight.pixels(picture)
        with self._turns.turn(), torch.inference_mode():
            self._switch(adapter)
            model = self._model.get_base_model() if self._adapted else self._model
            seen = model.get_image_features(pixel_values=pixels.to(self._device, model.dtype)[None])
            return self._sight.keep(picture.digest, adapter, seen.pooler_output[0])

    def _inputs(self, ids: list[int], features: list[Tensor]) -> dict[str, Tensor]:
        """`ids`, or what stands for them where there are images among them, whose vectors are taken off `features`."""
        ids_BL = torch.tensor([ids], device=self._device)
        if self._sight is None or not features:
            return {"input_ids": ids_BL}
        embeds_BLD = self._model.get_input_embeddings()(ids_BL)
        places = ids_BL[0] == self._sight.token
        count = int(places.sum())
        if count:
            embeds_BLD[0, places] = torch.stack(features[:count]).to(embeds_BLD)
            del features[:count]
        return {"inputs_embeds": embeds_BLD}

    def _forward(self, ids: list[int], cache: DynamicCache, adapter: str, features: list[Tensor]) -> Tensor:
        """Logits [V] after `ids`, float32 on the CPU; `cache` grows by them."""
        with self._turns.turn(), torch.inference_mode():
            self._switch(adapter)
            out = self._model(
                **self._inputs(ids, features),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits: Tensor = out.logits[0, -1].float().cpu()
            if self._sight is not None:
                logits[self._sight.token] = -torch.inf  # nobody draws here
            return logits

    def _switch(self, adapter: str) -> None:
        """Turn an adapter on, or all off. PEFT walks over every layer for it, so only when it is another one."""
        if not self._adapted or adapter == self._adapter:
            return
        if adapter:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(_inner(adapter), inference_mode=True)
        else:
            self._model.base_model.disable_adapter_layers()
        self._adapter = adapter


class FairLock:
    """A lock that is handed on in the order in which it was asked for."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._queue: deque[threading.Event] = deque()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        mine = threading.Event()
        with self._guard:
            self._queue.append(mine)
            if len(self._queue) == 1:
                mine.set()
        mine.wait()
        try:
            yield
        finally:
            with self._guard:
                self._queue.popleft()
                if self._queue:
                    self._queue[0].set()


def choose(
    logits_V: Tensor, prompt: Sequence[int], said: Sequence[int], sampling: Sampling, generator: torch.Generator
) -> int:
    """The next token after `prompt` and `said` by temperature, min-p (Nguyen et al. 2024), top-k, then top-p (Holtzman et
    al. 2020), after biases and penalties; the likeliest one at temperature 0."""
    logits_V = _weighed(logits_V, prompt, said, sampling)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if sampling.min_p > 0:
        logits_V[logits_V < logits_V.max() + math.log(sampling.min_p)] = -torch.inf
    if 0 < sampling.top_k < logits_V.numel():
        logits_V[logits_V < logits_V.topk(sampling.top_k).values[-1]] = -torch.inf
    probabilities_V, order_V = logits_V.softmax(-1).sort(descending=True)
    # A token stays while the mass before it is below top_p: the likeliest always stays.
    probabilities_V[probabilities_V.cumsum(-1) - probabilities_V >= sampling.top_p] = 0
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])


def _weighed(logits_V: Tensor, prompt: Sequence[int], said: Sequence[int], sampling: Sampling) -> Tensor:
    """In vLLM's order: biases; the repetition penalty (Keskar et al. 2019), of prompt and answer; OpenAI's penalties, of the
    answer alone."""
    bias, repetition = sampling.logit_bias, sampling.repetition_penalty
    frequency, presence = sampling.frequency_penalty, sampling.presence_penalty
    counted = said and (frequency or presence)
    if not (bias or counted) and repetition == 1.0:
        return logits_V
    logits_V = logits_V.clone()
    if bias:
        logits_V[list(bias)] += torch.tensor(list(bias.values()), dtype=logits_V.dtype)
    if repetition != 1.0:
        ids = torch.tensor(sorted({*prompt, *said}))
        old = logits_V[ids]
        logits_V[ids] = torch.where(old > 0, old / repetition, old * repetition)
    if counted:
        ids, counts = torch.tensor(said).unique(return_counts=True)
        logits_V[ids] -= frequency * counts + presence
    return logits_V


def how_likely(logits_V: Tensor, token: int, count: int) -> Likely:
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(count)
    return Likely(float(logprobs_V[token]), list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def _load(folder: Path, dtype: torch.dtype, bits: int) -> Any:
    """The model on the GPU if there is one. FailedPrecondition (MODEL_NOT_SERVABLE)."""
    disable_progress_bar()
    config = read_config(folder)
    quant = quantisation(from_json(QuantConfig, {"bits": bits}), dtype, is_llava(config))  # as in training
    try:
        model: Any = getattr(transformers, auto_class(config)).from_pretrained(
            folder,
            dtype=dtype,
            # Not even None where there is none: it would hide what a quantised model's own config says.
            **({"quantization_config": quant} if quant is not None else {}),
            device_map={"": 0} if torch.cuda.is_available() else None,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    except (ValueError, KeyError, OSError, ImportError, SafetensorError) as error:
        raise FailedPrecondition(
            f"transformers cannot load this model: {_first_line(error)}", reason="MODEL_NOT_SERVABLE"
        ) from error
    keep_layout(model, every=False)
    return model


def _with_adapter(model: Any, adapted: bool, key: str, folder: Path) -> Any:
    """`model` with one adapter more. FailedPrecondition (MODEL_NOT_SERVABLE); then it is as it was."""
    import peft

    if not (folder / "adapter_model.safetensors").exists():
        raise FailedPrecondition(f"{key} has no adapter_model.safetensors", reason="MODEL_NOT_SERVABLE")
    name = _inner(key)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.is_prompt_learning:
            raise FailedPrecondition(
                f"{key} is an adapter of learned prompts; only those that change layers can be served",
                reason="MODEL_NOT_SERVABLE",
            )
        if not adapted:
            return peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
        model.load_adapter(folder, adapter_name=name)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if adapted and name in model.peft_config:
            model.delete_adapter(name)
        raise FailedPrecondition(
            f"PEFT cannot load the adapter {key}: {_first_line(error)}", reason="MODEL_NOT_SERVABLE"
        ) from error
    return model


def _inner(key: str) -> str:
    """PEFT's name for an adapter: it becomes a name inside of modules, where 'train' or 'lora' mean something else."""
    return f"served-{key}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
