"""Curves: round ticks around any numbers, few points, nothing that SVG could misread."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.pages.curve import MOST_POINTS, svg, thinned, ticks

LOSSES = st.floats(-1e6, 1e6)


@given(LOSSES, LOSSES)
def test_ticks_surround_what_they_measure(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    assert found == sorted(set(found)) and 2 <= len(found) <= 9
    slack = (found[1] - found[0]) * 1e-6
    assert found[0] <= low + slack and found[-1] >= high - slack


def test_ticks_are_round() -> None:
    assert ticks(0, 50) == [0, 10, 20, 30, 40, 50]
    assert ticks(0.19, 3.41) == [0, 1, 2, 3, 4]


def test_a_long_curve_keeps_its_end() -> None:
    points = [(n, float(n)) for n in range(10_007)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS and kept[-1] == points[-1]
    assert list(thinned(points[:MOST_POINTS])) == points[:MOST_POINTS]


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats()), max_size=20))
def test_any_curve_is_well_formed(points: list[tuple[int, float]]) -> None:
    drawn = ET.fromstring(svg({"training": sorted(points, key=lambda p: p[0]), "a<b": []}))
    told = sum(math.isfinite(loss) for _, loss in points)
    assert len([e for e in drawn.iter() if e.tag == "circle"]) == told


def test_points_tell_their_numbers() -> None:
    assert "validation, step 20: 1.2500" in svg({"training": [(10, 2.0)], "validation": [(20, 1.25)]})
