"""What a run's numbers look like: a picture of its losses, and files for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DRAWN = 2000
"""Points of a curve that are drawn at most; a picture is no wider."""
SMOOTHING = 0.02
"""Part of all steps over which the drawn loss is averaged."""

Point = tuple[int, float]
"""(step, value)."""


def draw_losses(
    path: Path, title: str, losses: Sequence[Point], looks: Sequence[Point], rates: Sequence[Point]
) -> None:
    """A PNG of training loss, validation loss and learning rate by step."""
    # Without pyplot: it keeps figures for the whole process and looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, values = _thinned(losses)
    many = len(losses) > 20
    dots = "" if many else "."
    color, label = ("#9db8d9", None) if many else ("#1f5fa8", "training loss")
    upper.plot(steps, values, color=color, lw=1, marker=dots, label=label)
    if many:
        smooth = _smoothed(np.array([v for _, v in losses]))
        steps, values = _thinned([(s, float(v)) for (s, _), v in zip(losses, smooth, strict=True)])
        upper.plot(steps, values, color="#1f5fa8", lw=1.8, label=f"training loss, mean of {_window(len(losses))} steps")
    if looks:
        step, least = min(looks, key=lambda look: (look[1], look[0]))
        label = f"validation loss, least {least:.4f} after step {step}"
        upper.plot(*zip(*looks, strict=True), color="#c2410c", lw=1.4, marker="o", ms=4, label=label)
    upper.set(title=title, ylabel="loss per learned token")
    upper.legend(frameon=False)
    lower.plot(*_thinned(rates), color="#4b5563", lw=1.2, marker=dots)
    lower.set(xlabel="optimizer step", ylabel="learning rate")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(True, color="#e5e7eb", lw=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})


def _thinned(points: Sequence[Point]) -> tuple[list[int], list[float]]:
    some = points[:: -(-len(points) // DRAWN)] if len(points) > DRAWN else points
    return [step for step, _ in some], [value for _, value in some]


def _window(count: int) -> int:
    return max(5, round(count * SMOOTHING)) | 1


def _smoothed(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Each value's mean with its neighbours; at the ends with those there are."""
    half = _window(len(values)) // 2
    sums = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    means: np.ndarray[Any, Any] = (sums[last] - sums[first]) / (last - first)
    return means


def write_tensorboard(folder: Path, metrics: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> None:
    """Event files of a run's whole history, in place of those that are there. `metrics` and `samples` are events."""
    from tensorboardX import SummaryWriter

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    with SummaryWriter(str(folder)) as writer:
        for event in metrics:
            for name, value in event["values"].items():
                writer.add_scalar(_tag(name), value, event["step"], event["time"])
        for event in samples:
            text = f"**{event['prompt']}**\n\n{event['answer']}"
            writer.add_text("sample", text, event["step"], event["time"])


def _tag(name: str) -> str:
    """TensorBoard groups by what stands before the slash."""
    validation = name.startswith("validation_")
    return f"validation/{name.removeprefix('validation_')}" if validation else f"train/{name}"
