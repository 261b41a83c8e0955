"""A loss curve as SVG. Gradio's own plot fixes its colours and axes by the first data that it sees, and a run's grow."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 1000, 280
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 34
MOST_POINTS = 400
"""Of a curve; more are thinned out, the last always stays."""

Points = Sequence[tuple[int, float]]
"""(step, loss), by step; losses that are no numbers are left out."""


def svg(curves: Mapping[str, Points]) -> str:
    """One line a name, with axes, a legend, and each point's numbers for the mouse."""
    drawn = {name: thinned([p for p in points if math.isfinite(p[1])]) for name, points in curves.items()}
    every = [point for points in drawn.values() for point in points]
    if not every:
        return "<p>No loss yet.</p>"
    steps, losses = ticks(0, max(step for step, _ in every)), ticks(min(y for _, y in every), max(y for _, y in every))

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - steps[0]) / (steps[-1] - steps[0])

    def y(loss: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (loss - losses[0]) / (losses[-1] - losses[0])

    parts = [f'<path class="grid" d="M{LEFT} {y(t):.1f}H{WIDTH - RIGHT}"/>' for t in losses]
    parts += [f'<text x="{LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>' for t in losses]
    parts += [f'<text x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:g}</text>' for t in steps]
    for n, (name, points) in enumerate((name, points) for name, points in drawn.items() if points):
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)
        parts += [f'<polyline class="{html.escape(name)}" points="{path}"/>']
        parts += [
            f'<circle class="{html.escape(name)}" cx="{x(step):.1f}" cy="{y(loss):.1f}" r="4">'
            f"<title>{html.escape(name)}, step {step}: {loss:.4f}</title></circle>"
            for step, loss in points
        ]
        parts += [f'<text class="{html.escape(name)}" x="{WIDTH - RIGHT - 110 * n}" y="{TOP + 10}" text-anchor="end">']
        parts += [f"{html.escape(name)}</text>"]
    return f'<svg class="curve" role="img" aria-label="loss" viewBox="0 0 {WIDTH} {HEIGHT}">{"".join(parts)}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from at most `low` to at least `high`, about five, at least two."""
    step = 10 ** math.floor(math.log10(max(high - low, abs(high) * 1e-3, 1e-9)))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 6)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [float(f"{n * step:.12g}") for n in range(first, max(last, first + 1) + 1)]


def thinned(points: Points) -> Points:
    every = -(-len(points) // MOST_POINTS)
    return points[::-1][::every][::-1] if every > 1 else points
