"""Checkpoints: everything that decides how a run goes on, as one artifact. No pickle: tensors and JSON only.

adapter_model.safetensors, adapter_config.json   a PEFT adapter, usable as it is
optimizer.safetensors                            the optimizer's tensors, "<parameter>|<slot>"
rng.safetensors                                  torch's generator states
state.json                                       step, loss, and the optimizer's plain numbers
run_config.json                                  the run's config
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.finetune.config import TrainRun, from_json, to_json
from services.finetune.errors import FailedPrecondition
from services.finetune.store import Store
from services.finetune.store.artifacts import Parent, load, materialise, publish_directory


def save(
    store: Store,
    run: TrainRun,
    model: Any,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    meta: Mapping[str, Any],
    folder: Path,
) -> str:
    """Write a checkpoint below `folder`, store it, and return its digest. It is complete or absent."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    adapter = {k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(model).items()}
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict()
    config.update(base_model_name_or_path=run.base.name, inference_mode=True)
    (folder / "adapter_config.json").write_text(_dump({k: _plain(v) for k, v in config.items()}))
    tensors, numbers = _split(optimizer, parameters)
    save_file(tensors, folder / "optimizer.safetensors")
    save_file(_rng(), folder / "rng.safetensors")
    (folder / "state.json").write_text(_dump({**state, "optimizer": numbers}))
    (folder / "run_config.json").write_text(_dump(to_json(run.config)))
    parents = [Parent("base", run.base.digest, run.base.name)]
    parents += [Parent("dataset", d.digest, d.name) for d in run.datasets]
    return publish_directory(store, "checkpoint", folder, parents, meta)


def restore(
    store: Store,
    digest: str,
    run: TrainRun,
    model: Any,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    folder: Path,
) -> dict[str, Any]:
    """Put a checkpoint's state into model, optimizer and generators; its state.json.

    FailedPrecondition (RESUME_MISMATCH) if the run differs in what must be equal for an exact continuation.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    manifest = load(store, digest)
    materialise(store, manifest, folder)
    check_same(run, json.loads((folder / "run_config.json").read_text()), manifest.parents)
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    _join(optimizer, parameters, load_file(folder / "optimizer.safetensors"), state["optimizer"])
    for name, value in load_file(folder / "rng.safetensors").items():
        if name == "cpu":
            torch.set_rng_state(value)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(value)
    return state


def check_same(run: TrainRun, before: Any, parents: tuple[Parent, ...]) -> None:
    """Everything but the length of the run and its reports must be as it was."""
    then = to_json(from_json(type(run.config), before))
    now = to_json(run.config)
    for config in (then, now):
        config.pop("report")
        config["schedule"].pop("max_steps")
        # Where base and rows came from; what they are is compared by digest.
        config["model"].pop("checkpoint")
        config["data"].pop("sources")
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
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for name, parameter in parameters.items():
        # Not by state_dict(): bitsandbytes' hides its tensors in it under a key of its own.
        for slot, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{slot}"] = value.detach().cpu().contiguous().clone()
            else:
                numbers[f"{name}|{slot}"] = value
    return tensors, numbers


def _join(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    state: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        name, _, slot = key.rpartition("|")
        state.setdefault(name, {})[slot] = value
    paged = hasattr(optimizer, "init_state")
    if state and paged != any("state1" in slots for slots in state.values()):
        raise FailedPrecondition(
            "the checkpoint's optimizer is of another machine: paged_adamw_32bit is paged on a GPU only; go on where it "
            "was saved",
            reason="RESUME_MISMATCH",
        )
    if paged:
        _fill_paged(optimizer, parameters, state)
        return
    names = list(parameters)
    whole = optimizer.state_dict()
    whole["state"] = {names.index(name): slots for name, slots in state.items()}
    optimizer.load_state_dict(whole)


def _fill_paged(optimizer: Any, parameters: Mapping[str, Tensor], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore bitsandbytes' state into pages: its own load_state_dict would leave it all in GPU memory."""
    known = [(n, name, p) for n, (name, p) in enumerate(parameters.items()) if name in state]
    for n, _, parameter in known:
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, n)
    # Pages are zeroed by the GPU, in its own time.
    torch.cuda.synchronize()
    for _, name, parameter in known:
        slots = optimizer.state[parameter]
        for slot, value in state[name].items():
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
