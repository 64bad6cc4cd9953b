"""Memory over time as a picture: an SVG by our own means, a PNG through matplotlib."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.reporting.chart import Line, chart
from anarchobot.reporting.monitor import Sample
from anarchobot.storage.durable import write_atomic

LINES = {
    "process_gb": ("the process", "#1f77b4"),
    "active_memory_gb": ("MLX, active", "#2ca02c"),
    "cache_memory_gb": ("MLX, cache", "#9467bd"),
    "system_used_gb": ("the machine", "#999999"),
    "swap_used_gb": ("swap", "#d62728"),
}
TITLE = "memory in GB over seconds"


def check(path: Path) -> None:
    """Raises UserError when a picture can't be written there, before hours of watching."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: expected a .png or .svg file")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: no such folder: {path.parent}")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise UserError(f"--plot {path}: a PNG needs: pip install matplotlib; an .svg needs nothing")


def draw(path: Path, samples: Sequence[Sample]) -> None:
    """Writes the chart of `samples`; those lines that are nowhere known, or nowhere above 0, are left out."""
    curves = {name: _points(samples, name) for name in LINES}
    curves = {name: points for name, points in curves.items() if any(y > 0 for _, y in points)}
    if path.suffix == ".png":
        _png(path, curves)
    else:
        write_atomic(path, _svg(curves))


def _points(samples: Sequence[Sample], name: str) -> list[tuple[float, float]]:
    values = ((sample.time - samples[0].time, getattr(sample, name)) for sample in samples)
    return [(seconds, value) for seconds, value in values if value is not None]


def _svg(curves: dict[str, list[tuple[float, float]]]) -> str:
    style = "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.line{fill:none;stroke-width:1.5}"
    style += "".join(f".{name}{{stroke:{LINES[name][1]}}}" for name in curves)
    keys = "".join(
        f'<text x="64" y="{24 + 14 * i}" style="fill:{LINES[name][1]}">{LINES[name][0]}</text>'
        for i, name in enumerate(curves)
    )
    picture = chart(TITLE, [Line(LINES[name][0], name, points) for name, points in curves.items()], "seconds")
    head, start, rest = picture.partition("<svg ")
    whole = f'{head}{start}xmlns="http://www.w3.org/2000/svg" {rest}'
    return whole.replace("</svg>", f"<style>{style}</style>{keys}</svg>\n")


def _png(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=LINES[name][0], color=LINES[name][1])
    axes.set(title=TITLE, ylim=(0, None))
    axes.legend()
    figure.savefig(path)
