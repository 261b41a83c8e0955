"""GPTQ (Frantar et al. 2022): each column is rounded, and the columns after it make up for what that did to the outputs.

Layer by layer of the network: the inputs that calibration rows give a layer are kept, its linear layers are solved from
them, and the next layer sees what the rounded one puts out.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from services.finetune.config import DataConfig
from services.finetune.convert.compressed import group_of, int4_scales, packed
from services.finetune.convert.shards import progress
from services.finetune.errors import FailedPrecondition
from services.finetune.orders import PrepareRun, QuantizeTask
from services.finetune.packing import Blocks, order
from services.finetune.prepare import prepare
from services.finetune.progress import Attempt
from services.finetune.store.artifacts import Manifest, load, materialise

DAMP = 0.01
"""Part of the mean curvature that is added to each column's, so that it can be inverted."""
_BLOCK = 128


def solve(
    task: QuantizeTask,
    source: Manifest,
    folder: Path,
    layers: Mapping[str, tuple[int, int]],
    attempt: Attempt,
    stop: threading.Event,
    workdir: Path,
) -> dict[str, Mapping[str, Tensor]]:
    """What is stored of each linear layer. FailedPrecondition (CALIBRATION_EMPTY, MODEL_UNSUPPORTED), what `prepare`
    raises, Cancelled (STOPPED)."""
    from transformers import AutoModelForCausalLM

    rows = _rows(task, source, attempt, stop, workdir / "calibration")
    attempt.emit(
        "log", level="info", text=f"calibrating with {len(rows)} rows, {sum(row.numel() for row in rows)} tokens"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, trust_remote_code=False
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    stack, where = _stack(model)
    found: dict[str, Mapping[str, Tensor]] = {}
    tell = progress(attempt, stop)
    with torch.no_grad():
        calls = _calls(model, stack[0], [row.to(device) for row in rows], tell)
        for n, layer in enumerate(stack):
            linears = {k: m for k, m in layer.named_modules() if f"{where}.{n}.{k}" in layers}
            curvature = _curvature(layer, linears, calls)
            for name, module in linears.items():
                numbers, scale, near = _round(module.weight, curvature.pop(name))
                module.weight.copy_(near)
                found[f"{where}.{n}.{name}"] = {k: v.cpu() for k, v in packed(numbers, scale).items()}
            for call in calls:
                call[0] = _hidden(layer(call[0], **call[1]))
            # The writing of all this is told anew, from the beginning.
            tell(0, 1)
    return found


def _rows(task: QuantizeTask, source: Manifest, attempt: Attempt, stop: threading.Event, workdir: Path) -> list[Tensor]:
    """Token ids [1, T] of rows drawn from the calibration revision, prepared as training would prepare them."""
    assert task.calibration is not None
    data = DataConfig(
        template=source.meta["template"] or "tokenizer",
        system=source.meta["system"],
        max_length=task.max_length,
        pack=False,
    )
    run = PrepareRun(job=attempt.job_key, model=task.model, datasets=(task.calibration,), data=data)
    digest = prepare(run, attempt, stop, workdir)["prepared"]
    folder = materialise(attempt.store, load(attempt.store, digest), workdir / "blocks")
    flat = Blocks.open(folder).flat
    chosen = order(len(flat.offsets) - 1, 0, 0)[: task.calibration_rows]
    rows = [torch.from_numpy(flat.sample(int(n))[0].astype("int64"))[None, : task.max_length] for n in chosen]
    if not rows:
        raise FailedPrecondition(f"{task.calibration.name} has no row to calibrate with", reason="CALIBRATION_EMPTY")
    return rows


def _stack(model: Any) -> tuple[nn.ModuleList, str]:
    """The network's layers, and the name before their numbers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return module, name
    raise FailedPrecondition("the model has no stack of layers to calibrate", reason="MODEL_UNSUPPORTED")


class _Reached(Exception):
    """The first layer was reached: what it is called with is known."""


def _calls(model: Any, first: nn.Module, rows: list[Tensor], tell: Any) -> list[list[Any]]:
    """For each row [hidden states, further arguments] that the layers are called with."""
    found: list[list[Any]] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append([args[0], {k: v for k, v in kwargs.items() if k != "past_key_values"}])
        raise _Reached

    hook = first.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for row in rows:
            tell(0, 1)
            with contextlib.suppress(_Reached):
                model(row, use_cache=False)
    finally:
        hook.remove()
    return found


def _curvature(layer: nn.Module, linears: Mapping[str, nn.Module], calls: list[list[Any]]) -> dict[str, Tensor]:
    """Of each linear layer the sum of x x^T over all tokens x, [in, in] in float32."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in linears.items():

        def add(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            x_TI = args[0].reshape(-1, args[0].shape[-1]).float()
            sums[name] = sums.get(name, 0) + x_TI.T @ x_TI

        hooks.append(module.register_forward_pre_hook(add))
    for call in calls:
        layer(call[0], **call[1])
    for hook in hooks:
        hook.remove()
    return sums


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _round(weight: Tensor, curvature_II: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(-8 … 7 [out, in], scales [out, groups], the weight that they stand for)."""
    w_OI, width = weight.float().clone(), weight.shape[1]
    scale = int4_scales(weight, group_of(width))
    each = scale.float().repeat_interleave(width // scale.shape[1], 1)
    idle = curvature_II.diagonal() == 0
    curvature_II.diagonal()[idle] = 1
    w_OI[:, idle] = 0
    curvature_II.diagonal().add_(DAMP * curvature_II.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(curvature_II))
    upper_II = torch.linalg.cholesky(inverse, upper=True)
    numbers = torch.empty_like(w_OI)
    for first in range(0, width, _BLOCK):
        last = min(first + _BLOCK, width)
        errors = torch.zeros_like(w_OI[:, first:last])
        for i in range(first, last):
            numbers[:, i] = (w_OI[:, i] / each[:, i]).round().clamp(-8, 7)
            error = (w_OI[:, i] - numbers[:, i] * each[:, i]) / upper_II[i, i]
            w_OI[:, i:last] -= error[:, None] * upper_II[i, i:last]
            errors[:, i - first] = error
        w_OI[:, last:] -= errors @ upper_II[first:last, last:]
    return numbers.to(torch.int8), scale, (numbers * each).to(weight.dtype)
