"""Line charts as SVG, without scripts or a plotting library."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34  # margins
MAX_POINTS = 1200  # per line: about two per pixel


@dataclass(frozen=True)
class Series:
    """Points (x, y) in order of x. The class `css` sets the color. `faint` series are drawn behind the others."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


def ema_smooth(points: Sequence[tuple[int, float]], decay: float = 0.9) -> list[tuple[int, float]]:
    """Exponential moving average with Adam's bias correction."""
    result, mean, weight = [], 0.0, 0.0
    for x, y in points:
        mean, weight = decay * mean + (1 - decay) * y, decay * weight + 1 - decay
        result.append((x, mean / weight))
    return result


def line_chart(title: str, series: Sequence[Series], x_label: str = "step") -> str:
    """Returns an <svg> element, or "" if there is no finite point. The y axis is logarithmic if y spans a factor of
    more than 100."""
    drawn = [Series(s.name, s.css, downsample(finite(s.points)), s.faint) for s in series]
    drawn = [s for s in drawn if s.points]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [y for s in drawn for _, y in s.points]
    log = min(ys) > 0 and max(ys) / min(ys) > 100
    x_ticks, y_ticks = ticks(min(xs), max(xs)), log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = (min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))

    def position(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = _fraction(y, y_low, y_high, log)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        _, at = position(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{format_number(y)}</text>')
    for x in x_ticks:
        at, _ = position(x, y_low)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{format_number(x)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    if log:
        parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">logarithmic</text>')
    for s in sorted(drawn, key=lambda s: not s.faint):
        positions = [position(x, y) for x, y in s.points]
        classes = f"line {s.css}{' faint' if s.faint else ''}"
        if len(positions) == 1:
            parts.append(f'<circle class="{classes}" cx="{positions[0][0]:.1f}" cy="{positions[0][1]:.1f}" r="3"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
            parts.append(f'<polyline class="{classes}" points="{path}"><title>{escape(s.name)}</title></polyline>')
    return "".join([*parts, "</svg>"])


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def downsample(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns about MAX_POINTS points: the minimum and maximum of each interval, so spikes survive."""
    interval = -(-2 * len(points) // MAX_POINTS)
    if interval <= 2:
        return list(points)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), interval):
        part = points[start : start + interval]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += [low] if low == high else sorted((low, high))
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns about `count` round numbers in [low, high], spaced by 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    if raw < sys.float_info.min:  # also for subnormal differences
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def log_ticks(low: float, high: float) -> list[float]:
    return [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def format_number(value: float) -> str:
    """1500000 as 1.5M, 0.0003 as 3e-04."""
    if value == 0:
        return "0"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def _fraction(y: float, low: float, high: float, log: bool) -> float:
    if log:
        y, low, high = math.log10(y), math.log10(low), math.log10(high)
    return (y - low) / ((high - low) or 1)
