"""Checkpoints: everything that decides how a run goes on, as one artifact. No pickle: tensors and JSON only.

adapter_model.safetensors, adapter_config.json   a PEFT adapter, usable as it is; or
model.safetensors                                the weights that full training changed, in float32
optimizer.safetensors                            the optimizer's tensors, "<parameter>|<slot>"
rng.safetensors                                  torch's generator states
state.json                                       step, loss, what validation said, the optimizer's plain numbers and the
                                                 loss scale; of a whole model also other names of its weights ("tied")
run_config.json                                  the run's config
steps.jsonl.gz                                   the step log; see steplog.py

What is large is in several files: model-00001-of-00004.safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from services.finetune.config import from_json, to_json
from services.finetune.errors import FailedPrecondition
from services.finetune.orders import TrainRun
from services.finetune.store import Store
from services.finetune.store.artifacts import Parent, load, materialise, publish_directory
from services.finetune.train.steplog import NAME, write_log

if TYPE_CHECKING:
    from services.finetune.train.zero import Zero


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run's state in host memory, or on its way there until `ready` (a CUDA event). It shares nothing with the model."""

    config: Mapping[str, Any] | None
    """The adapter's; None for a model that is trained whole."""
    weights: Mapping[str, Tensor]
    tied: Sequence[str]
    optimizer: Mapping[str, Tensor]
    numbers: Mapping[str, Any]
    rng: Mapping[str, Tensor]
    ready: Any


def snapshot(
    model: Any, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, zero: Zero | None = None
) -> Snapshot:
    """Begin to copy the state. On a GPU weights must not change before `ready`; reading them is free to go on.

    What `zero` dealt out is put together, in which all ranks take part; only rank 0's snapshot holds anything then.
    """
    from peft import get_peft_model_state_dict

    if _is_bitsandbytes(optimizer) and torch.cuda.is_available():
        torch.cuda.synchronize()  # pages are read by the host itself
    adapted = hasattr(model, "peft_config")
    weights: Mapping[str, Tensor] = parameters
    if adapted:
        named = dict(parameters) if zero else None  # a state_dict's tensors know nothing of the other parts
        weights = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    with _Copies(keep=zero is None or zero.group.speaks) as copies:
        taken = {k: copies.take(zero.whole(v) if zero else v) for k, v in weights.items()}
        if zero is None:
            tensors, numbers = _split(optimizer, parameters, copies)
        else:
            tensors, numbers = {k: copies.take(v) for k, v in zero.state(parameters)}, {}
    config = model.peft_config["default"].to_dict() if adapted else None
    return Snapshot(config, taken, [] if adapted else _tied(model), tensors, numbers, _rng(), copies.ready)


def _tied(model: Any) -> list[str]:
    """Further names of weights that have one already."""
    names = {n for n, _ in model.named_parameters()}
    return sorted(n for n, _ in model.named_parameters(remove_duplicate=False) if n not in names)


class _Copies:
    """Copies to host memory: beside the GPU's work, on a stream of their own."""

    def __init__(self, keep: bool = True) -> None:
        self.keep = keep
        self.ready: Any = None
        self._stream: Any = None

    def __enter__(self) -> _Copies:
        if torch.cuda.is_available():
            self._stream = torch.cuda.Stream()
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self.ready = self._stream.record_event()

    def take(self, value: Tensor) -> Tensor:
        value = value.detach()
        if not self.keep:
            return value.new_empty(0)
        if not value.is_cuda:
            return value.contiguous().clone()
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        value.record_stream(self._stream)  # it may have been put together for this only, and just now
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            return host.copy_(value, non_blocking=True)


def save(
    store: Store,
    run: TrainRun,
    taken: Snapshot,
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    lines: Sequence[str],
    folder: Path,
) -> str:
    """Write a checkpoint below `folder`, store it, and return its digest. It is complete or absent."""
    if taken.ready is not None:
        taken.ready.synchronize()
    folder.mkdir(parents=True)
    if taken.config is None:
        write_sharded(taken.weights, folder, "model")
        state = {**state, "tied": taken.tied}
    else:
        write_tensors(taken.weights, folder / "adapter_model.safetensors")
        config = {**taken.config, "base_model_name_or_path": run.base.name, "inference_mode": True}
        (folder / "adapter_config.json").write_text(_dump({k: _plain(v) for k, v in config.items()}))
    write_sharded(taken.optimizer, folder, "optimizer")
    write_tensors(taken.rng, folder / "rng.safetensors")
    (folder / "state.json").write_text(_dump({**state, "optimizer": taken.numbers}))
    (folder / "run_config.json").write_text(_dump(to_json(run.config)))
    write_log(lines, folder / NAME)
    parents = [Parent("base", run.base.digest, run.base.name)]
    parents += [Parent("dataset", d.digest, d.name) for d in run.datasets]
    return publish_directory(store, "checkpoint", folder, parents, meta)


SHARD_BYTES = 4 << 30
"""Of one file of a checkpoint, so that blobs are sent and taken up again in pieces of a sensible size."""


def write_sharded(tensors: Mapping[str, Tensor], folder: Path, stem: str, limit: int = SHARD_BYTES) -> None:
    """Write files below `limit` bytes, unless one tensor alone is above it; a single one is stem.safetensors."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in sorted(tensors.items()):
        if shards[-1] and size + value.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    for n, shard in enumerate(shards, 1):
        part = f"-{n:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        write_tensors(shard, folder / f"{stem}{part}.safetensors")


def read_sharded(folder: Path, stem: str) -> dict[str, Tensor]:
    """What write_sharded wrote."""
    from safetensors.torch import load_file

    return {k: v for path in sorted(folder.glob(f"{stem}*.safetensors")) for k, v in load_file(path).items()}


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. The package's own writer copies each tensor and keeps Python from running meanwhile,
    which a training step beside it cannot bear."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    # Wide types first keeps every tensor aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        value = tensors[name]
        end = at + value.numel() * value.element_size()
        header[name] = {"dtype": _DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].reshape(-1).view(torch.uint8).numpy().data)


_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}


def restore(
    store: Store,
    digest: str,
    run: TrainRun,
    model: Any,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    folder: Path,
    zero: Zero | None = None,
) -> dict[str, Any]:
    """Put a checkpoint's state into model, optimizer and generators; its state.json.

    FailedPrecondition (RESUME_MISMATCH) if the run differs in what must be equal for an exact continuation.
    """
    from safetensors.torch import load_file

    manifest = load(store, digest)
    materialise(store, manifest, folder)
    check_same(run, json.loads((folder / "run_config.json").read_text()), manifest.parents)
    with zero.writing(parameters) if zero else nullcontext():
        _fill_weights(model, parameters, folder)
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    kept = _by_parameter({**read_sharded(folder, "optimizer"), **state["optimizer"]})
    if zero is None:
        _join(optimizer, parameters, kept)
    else:
        zero.fill(parameters, kept)
    for name, value in load_file(folder / "rng.safetensors").items():
        if name == "cpu":
            torch.set_rng_state(value)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(value)
    return state


def _fill_weights(model: Any, parameters: Mapping[str, Tensor], folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    if hasattr(model, "peft_config"):
        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    weights = read_sharded(folder, "model")
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])


def check_same(run: TrainRun, before: Any, parents: tuple[Parent, ...]) -> None:
    """Everything but the length of the run and its reports must be as it was."""
    then = to_json(from_json(type(run.config), before))
    now = to_json(run.config)
    for config in (then, now):
        config.pop("report")
        # How many processes share a step, and how, changes nothing in it.
        config.pop("parallel")
        config["schedule"].pop("max_steps")
        # How often is free; which rows are held out is not.
        config["validation"] = {"ratio": config["validation"]["ratio"]}
        # Where base and rows came from; what they are is compared by digest.
        config["model"].pop("checkpoint")
        config["data"].pop("sources")
        # What is kept and what is computed again gives the same numbers.
        config["model"].pop("gradient_checkpointing")
        config["model"].pop("gradient_checkpointing_every")
    changed = [f"{s}.{k}" for s in now if isinstance(now[s], dict) for k in now[s] if now[s][k] != then[s][k]]
    base = next(p.digest for p in parents if p.role == "base")
    data = [p.digest for p in parents if p.role == "dataset"]
    changed += ["the base model"] if base != run.base.digest else []
    changed += ["the datasets"] if data != [d.digest for d in run.datasets] else []
    if changed or now["method"] != then["method"]:
        raise FailedPrecondition(
            f"cannot go on exactly from this checkpoint: changed are {', '.join(changed) or 'method'}",
            reason="RESUME_MISMATCH",
        )


def _split(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], copies: _Copies
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        # Not by state_dict(): bitsandbytes' hides its tensors in it under a key of its own.
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{slot}"] = copies.take(value)
            else:
                numbers[f"{name}|{slot}"] = value
    return tensors, numbers


def _by_parameter(kept: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{parameter: {slot: value}} of what is kept under "<parameter>|<slot>"."""
    state: dict[str, dict[str, Any]] = {}
    for key, value in kept.items():
        name, _, slot = key.rpartition("|")
        state.setdefault(name, {})[slot] = value
    return state


def _join(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]
) -> None:
    own = _is_bitsandbytes(optimizer)
    if state and own != any("state1" in slots for slots in state.values()):
        raise FailedPrecondition(
            "the checkpoint's optimizer is of another machine: paged_adamw_32bit is paged on a GPU only, and torch's "
            "adamw elsewhere; go on where it was saved",
            reason="RESUME_MISMATCH",
        )
    if own:
        _fill(optimizer, parameters, state)
        return
    places = {id(p): n for n, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    whole = optimizer.state_dict()
    whole["state"] = {places[id(parameters[name])]: slots for name, slots in state.items()}
    optimizer.load_state_dict(whole)


def _is_bitsandbytes(optimizer: Any) -> bool:
    return hasattr(optimizer, "init_state")


def _fill(optimizer: Any, parameters: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore bitsandbytes' state where it makes it: its own load_state_dict would leave pages in GPU memory."""
    for g, group in enumerate(optimizer.param_groups):
        for n, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, g, n)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # pages are zeroed by the GPU, in its own time
    for name, kept in state.items():
        slots = optimizer.state[parameters[name]]
        for slot, value in kept.items():
            if isinstance(value, Tensor):
                slots[slot].copy_(value)
            else:
                slots[slot] = value


def _rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)  # a set's order changes from process to process; the digest must not
    return value if isinstance(value, str | int | float | bool | list | dict | None) else str(value)


def _dump(data: Any) -> str:
    return json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False)
