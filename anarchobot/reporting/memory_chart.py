"""Plots monitored memory over time: SVG without a library, PNG with matplotlib."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.reporting.chart import Series, line_chart
from anarchobot.reporting.monitor import Sample
from anarchobot.storage.durable import write_atomic

CURVES = {  # field of Sample: label and color
    "process_gb": ("process", "#1f77b4"),
    "active_memory_gb": ("MLX active", "#2ca02c"),
    "cache_memory_gb": ("MLX cache", "#9467bd"),
    "system_used_gb": ("machine", "#999999"),
    "swap_used_gb": ("swap", "#d62728"),
}
TITLE = "memory in GB over seconds"

Points = dict[str, list[tuple[float, float]]]


def check_plot_path(path: Path) -> None:
    """Raises UserError if no plot can be written to `path`. Call it before monitoring for hours."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--plot {path}: expected a .png or .svg file")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: no such folder: {path.parent}")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise UserError(f"--plot {path}: PNG needs matplotlib: pip install matplotlib, or use .svg")


def plot_memory(path: Path, samples: Sequence[Sample]) -> None:
    """Writes the plot. Curves that are unknown or always 0 are omitted."""
    curves = {name: _points(samples, name) for name in CURVES}
    curves = {name: points for name, points in curves.items() if any(y > 0 for _, y in points)}
    if path.suffix == ".png":
        _write_png(path, curves)
    else:
        write_atomic(path, _svg(curves))


def _points(samples: Sequence[Sample], name: str) -> list[tuple[float, float]]:
    values = ((sample.time - samples[0].time, getattr(sample, name)) for sample in samples)
    return [(seconds, value) for seconds, value in values if value is not None]


def _svg(curves: Points) -> str:
    style = "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.line{fill:none;stroke-width:1.5}"
    style += "".join(f".{name}{{stroke:{CURVES[name][1]}}}" for name in curves)
    legend = "".join(
        f'<text x="64" y="{24 + 14 * i}" style="fill:{CURVES[name][1]}">{CURVES[name][0]}</text>'
        for i, name in enumerate(curves)
    )
    svg = line_chart(TITLE, [Series(CURVES[name][0], name, points) for name, points in curves.items()], "seconds")
    svg = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return svg.replace("</svg>", f"<style>{style}</style>{legend}</svg>\n")


def _write_png(path: Path, curves: Points) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=CURVES[name][0], color=CURVES[name][1])
    axes.set(title=TITLE, ylim=(0, None))
    axes.legend()
    figure.savefig(path)
