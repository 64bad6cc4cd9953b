"""Line charts as SVG text: no script, no library, nothing fetched."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 34
MOST_POINTS = 1200  # of a line: more than there are pixels tells nothing


@dataclass(frozen=True)
class Line:
    """`name` for people, a CSS class for its colour, (x, y) points by x; `faint` stands behind the others."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


def smoothed(points: Sequence[tuple[int, float]], weight: float = 0.9) -> list[tuple[int, float]]:
    """A running average that forgets by `weight` a point, without the pull of its start (as Adam corrects for it)."""
    result, mean, total = [], 0.0, 0.0
    for x, y in points:
        mean, total = weight * mean + (1 - weight) * y, weight * total + 1 - weight
        result.append((x, mean / total))
    return result


def chart(title: str, lines: Sequence[Line], x_label: str = "step") -> str:
    """An <svg>, or "" when there is nothing finite to draw. Where y spans more than two powers of ten, it is on a
    logarithmic scale, and says so."""
    kept = [Line(n.name, n.css, thinned(finite(n.points)), n.faint) for n in lines]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    xs = [x for line in kept for x, _ in line.points]
    ys = [y for line in kept for _, y in line.points]
    log = min(ys) > 0 and max(ys) / min(ys) > 100
    x_ticks, y_ticks = ticks(min(xs), max(xs)), log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = (min(*ys, y_ticks[0]), max(*ys, y_ticks[-1]))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = _share(y, y_low, y_high, log)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        _, at = place(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        at, _ = place(x, y_low)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(x_label)}</text>')
    if log:
        parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">logarithmic</text>')
    for line in sorted(kept, key=lambda line: not line.faint):
        places = [place(x, y) for x, y in line.points]
        kind = f"line {line.css}{' faint' if line.faint else ''}"
        if len(places) == 1:
            parts.append(f'<circle class="{kind}" cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline class="{kind}" points="{path}"><title>{escape(line.name)}</title></polyline>')
    return "".join([*parts, "</svg>"])


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about MOST_POINTS of them: of each stretch its least and its largest, so that no spike is lost."""
    stretch = -(-2 * len(points) // MOST_POINTS)
    if stretch <= 2:
        return list(points)
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        low, high = min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])
        kept += [low] if low == high else sorted((low, high))
    return kept


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]; `low` alone where the two are equal."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def log_ticks(low: float, high: float) -> list[float]:
    return [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def short(value: float) -> str:
    """1500000 as 1.5M, 0.0003 as 3e-04."""
    if value == 0:
        return "0"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.0e}"


def _share(y: float, low: float, high: float, log: bool) -> float:
    if log:
        y, low, high = math.log10(y), math.log10(low), math.log10(high)
    return (y - low) / ((high - low) or 1)
