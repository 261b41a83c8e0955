"""What a job would take, told before it is made. Whatever cannot be known is left out and said; nothing here fails a job."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from services.common.records import Record
from services.common.settings import Settings
from services.finetune import plan
from services.finetune.config import RunConfig
from services.finetune.devices import DEVICES, GIB, USE, Device, cpu_has_bfloat16, seconds
from services.finetune.errors import InvalidArgument, QuartetError, nearest
from services.finetune.fitting import Change, changes
from services.finetune.orders import TrainRun
from services.finetune.plan import Batch
from services.finetune.shape import Shape, read_shape, tensor_shapes
from services.finetune.store import Store
from services.finetune.store.artifacts import load, read_file
from services.training.sampling import Figures, figures


@dataclass(slots=True)
class Planned:
    """A plan; None and 0 are unknown. `assumptions` is for people."""

    data: Figures | None = None
    steps: int = 0
    steps_per_epoch: int = 0
    memory: plan.Memory | None = None
    fits: str = "UNKNOWN"
    changes: list[Change] = field(default_factory=list)
    seconds: tuple[float, float] = (0.0, 0.0)
    engine: str = ""
    dtype: str = ""
    device: Device = field(default_factory=Device)
    assumptions: list[str] = field(default_factory=list)


class Planner:
    """Plans of one service's jobs. `device` is where its workers compute, as far as it knows."""

    def __init__(self, store: Store, device: Device) -> None:
        self._store = store
        self._device = device
        self._shape = lru_cache(maxsize=64)(self._read_shape)  # digests name the same for ever

    def plan(self, run: TrainRun, asked: Device | None, earlier: Iterable[Record]) -> Planned:
        """InvalidArgument (DEVICE_UNKNOWN) for a device that is not in the table."""
        made = Planned(device=_device(asked or self._device))
        made.dtype = _dtype(run.config, made.device)
        try:
            made.data = figures(self._store, run)
        except QuartetError as error:
            made.assumptions.append(f"the data is not known: {error.message}")
        _steps(made, run.config)
        try:
            shape = self._shape(run.base.digest)
            _time(made, shape, run, earlier)
            _memory(made, shape, run.config)
        except QuartetError as error:
            made.assumptions.append(f"memory is not known: {error.message}")
        return made

    def _read_shape(self, digest: str) -> Shape:
        manifest = load(self._store, digest)
        shapes: dict[str, list[int]] = {}
        for file in manifest.files:
            if file.path.endswith(".safetensors"):
                blob = partial(self._store.read_blob, file.digest)
                shapes |= tensor_shapes(lambda offset, length, blob=blob: b"".join(blob(offset, length)))  # type: ignore[misc]
        return read_shape(json.loads(read_file(self._store, manifest, "config.json")), shapes)


def machine(settings: Settings) -> Device:
    """Where workers of these settings compute: what they say, else what this machine has if they run on it."""
    memory = int(settings.gpu_memory_gib * GIB)
    if settings.gpu_kind or memory:
        return Device(settings.gpu_kind, memory)
    if settings.launcher != "local":
        return Device()
    models = [p.read_text() for p in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    if not models:
        return Device("cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    text = models[0].lower().replace(" ", "")
    return Device(next((kind for kind in DEVICES if kind.partition("-")[0] in text), ""))


def _device(asked: Device) -> Device:
    if asked.kind not in ("", "cpu", *DEVICES):
        raise InvalidArgument(
            f"no device {asked.kind!r} is known{nearest(asked.kind, ['cpu', *DEVICES])}",
            reason="DEVICE_UNKNOWN",
            metadata={"device": asked.kind},
        )
    known = DEVICES.get(asked.kind)
    return Device(asked.kind, asked.memory or (known.memory if known else 0))


def _dtype(config: RunConfig, device: Device) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    if device.gpu:
        return "float16" if device.kind in ("v100", "t4") else "bfloat16"
    return "bfloat16" if cpu_has_bfloat16() else "float32"


def _steps(made: Planned, config: RunConfig) -> None:
    schedule, data = config.schedule, made.data
    if data is not None:
        made.steps_per_epoch = math.ceil(data.blocks / schedule.blocks_per_step)
        if data.sampled_rows:
            made.assumptions.append(
                f"the data is an estimate from {data.sampled_rows} of {data.rows} rows; prepare the dataset to know"
            )
    made.steps = schedule.max_steps or made.steps_per_epoch * schedule.epochs


def _batch(made: Planned, shape: Shape, config: RunConfig) -> Batch:
    """The largest micro-step: full blocks, learned as the mean is, with as many images."""
    data, blocks = made.data, config.schedule.batch_size
    if data is None:
        tokens = blocks * config.data.max_length
        images = tokens // shape.tower.given if shape.tower else 0
        shown = f" and as {images} images" if images else ""
        made.assumptions.append(f"blocks are taken as full, and every token as learned{shown}")
        return Batch(blocks, config.data.max_length, tokens, images)
    tokens = blocks * data.block_length
    learned = min(tokens, math.ceil(tokens * data.learned_tokens / data.tokens))
    return Batch(blocks, data.block_length, learned, math.ceil(blocks * data.images / data.blocks))


def _memory(made: Planned, shape: Shape, config: RunConfig) -> None:
    batch, device = _batch(made, shape, config), made.device
    made.engine = plan.engine(shape, config, device, made.dtype)
    made.memory = plan.memory(shape, config, batch, made.steps, device, made.dtype)
    if made.engine in ("fused", "dealt"):
        made.assumptions.append(
            "layers that do not fit run forward twice, by themselves and slower; see changes if none does"
        )
    if made.engine == "dealt" or made.engine.startswith("deepspeed"):
        made.assumptions.append(
            f"dealt out over {plan.processes(config)} processes: set parallel.processes if it is others"
        )
    if not device.memory:
        made.assumptions.append(
            "the device's memory is not known: name a GPU (--gpu), or its memory (--gpu-memory-gib)"
        )
        return
    made.fits = "YES" if made.memory.peak <= device.memory else "NO"
    if made.fits == "NO":
        made.changes = changes(shape, config, batch, made.steps, device, made.dtype)


def _time(made: Planned, shape: Shape, run: TrainRun, earlier: Iterable[Record]) -> None:
    data = made.data
    if data is None or not data.blocks or not made.steps:
        return
    schedule = run.config.schedule
    blocks = made.steps * schedule.blocks_per_step
    tokens = int(data.tokens * (blocks / data.blocks if schedule.max_steps else schedule.epochs))
    speeds = [s for job in earlier if (s := _speed(job, run)) > 0]
    if speeds:
        # One job's speed changes by so much with what else its machine does.
        made.seconds = (tokens / (1.2 * max(speeds)), tokens / (0.8 * min(speeds)))
        made.assumptions.append(f"time by the speed of {len(speeds)} earlier jobs of this shape")
        return
    found = seconds(shape, tokens, made.device, 0.0)
    if found is not None:
        made.seconds = found
        made.assumptions.append(f"time by operations, at {USE[0]:.0%} to {USE[1]:.0%} of the GPU's peak")
    else:
        made.assumptions.append("time is left out: no earlier job of this shape, and the device's speed is not known")


def _speed(job: Record, run: TrainRun) -> float:
    """Tokens a second of an earlier job that did the same work a token; 0 of another."""
    before: Mapping[str, Any] = job.body["spec"].get("run") or {}
    config, now = before.get("config") or {}, run.config
    try:
        same = (
            before["base"]["digest"] == run.base.digest
            and config["method"] == now.method
            and config["model"]["dtype"] == now.model.dtype
            and config["lora"]["rank"] == now.lora.rank
            and config["data"]["max_length"] == now.data.max_length
            and config["schedule"]["batch_size"] == now.schedule.batch_size
        )
    except KeyError:
        return 0.0  # written by an older version
    return float(job.body.get("progress", {}).get("tokens_per_s", 0.0)) if same else 0.0


def to_message(made: Planned) -> dict[str, Any]:
    """A plan as the contract's fields."""
    found: dict[str, Any] = {
        "steps": made.steps,
        "steps_per_epoch": made.steps_per_epoch,
        "fits": made.fits,
        "least_s": made.seconds[0],
        "most_s": made.seconds[1],
        "engine": made.engine,
        "dtype": made.dtype,
        "device": asdict(made.device),
        "assumptions": made.assumptions,
        "changes": [
            {"overrides": dict(c.overrides), "device": c.device, "message": c.told, "peak": c.peak}
            for c in made.changes
        ],
    }
    if made.data is not None:
        found["data"] = asdict(made.data)
    if made.memory is not None:
        found["memory"] = {**asdict(made.memory), "peak": made.memory.peak}
    return found
