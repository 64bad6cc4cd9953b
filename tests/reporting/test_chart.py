"""Scales, downsampling and smoothing of the SVG charts."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.reporting.chart import (
    LEFT,
    MAX_POINTS,
    RIGHT,
    WIDTH,
    Series,
    downsample,
    ema_smooth,
    line_chart,
    log_ticks,
    ticks,
)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_lie_inside_the_range(low: float, span: float) -> None:
    high = low + span
    found = ticks(low, high)
    assert 1 <= len(found) <= 12
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert log_ticks(0.02, 30) == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_downsampling_keeps_spikes() -> None:
    points = [(float(x), math.sin(x / 500)) for x in range(100_000)]
    points[54_321] = (54_321.0, 50.0)
    points[77_777] = (77_777.0, -50.0)
    kept = downsample(points)
    assert len(kept) <= MAX_POINTS + 2 and points[54_321] in kept and points[77_777] in kept
    assert kept == sorted(kept)


def test_nonfinite_points_are_dropped_and_wide_ranges_are_logarithmic() -> None:
    assert line_chart("x", [Series("a", "c0", [(1, math.nan), (2, math.inf)])]) == ""
    drawing = line_chart("x", [Series("a", "c0", [(1, 1.0), (2, 10.0), (3, 100.0), (4, 1000.0)])])
    assert "logarithmic" in drawing
    (line,) = [e for e in ET.fromstring(drawing).iter() if e.tag == "polyline"]
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert [a - b for a, b in pairwise(heights)] == pytest.approx([heights[0] - heights[1]] * 3, abs=0.2)


def test_a_line_spans_the_width_and_a_single_point_is_a_circle() -> None:
    drawing = ET.fromstring(line_chart("x", [Series("a", "c0", [(10, 1.0), (15, 2.0), (20, 3.0)])]))
    (line,) = [e for e in drawing.iter() if e.tag == "polyline"]
    across = [float(point.split(",")[0]) for point in line.attrib["points"].split()]
    assert across == pytest.approx([LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT])
    drawing = ET.fromstring(line_chart("x", [Series("a", "c0", [(10, 1.0)])]))
    (point,) = [e for e in drawing.iter() if e.tag == "circle"]
    assert float(point.attrib["cx"]) == LEFT


def test_smoothing_is_bias_corrected() -> None:
    found = ema_smooth([(1, 4.0), (2, 2.0)], 0.9)
    assert found == [(1, pytest.approx(4.0)), (2, pytest.approx((0.9 * 0.1 * 4 + 0.1 * 2) / (1 - 0.81)))]
