"""Renders runs as one self-contained HTML page: inline SVG, no scripts, nothing loaded from elsewhere."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader

from anarchobot.reporting.chart import Series, ema_smooth, line_chart
from anarchobot.runs.run_log import RunLog

MAX_SAMPLES = 6  # most recent samples per run
MAX_EVENTS = 200  # most recent events per run; earlier events are only counted
NOTABLE_EVENTS = ("skip", "resume", "warning", "end")
PALETTE = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#8a6d00", "#5f3dc4")  # cycled


def render_page(template: str, **values: Any) -> str:
    """The page of a template in this package. Everything in `values` is escaped."""
    environment = Environment(
        loader=PackageLoader("anarchobot", "reporting"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    page = environment.get_template(template).render(values)
    return page.encode("utf-8", "backslashreplace").decode()  # surrogates, which JSON can hold


def render_report(runs: Sequence[RunLog]) -> str:
    """Returns the page."""
    return render_page(
        "report.html.jinja",
        title=" and ".join(run.name for run in runs) if len(runs) <= 2 else f"{len(runs)} runs",
        runs=runs,
        palette=PALETTE,
        summary={name: [format_value(run) for run in runs] for name, format_value in SUMMARY.items()},
        charts=list(_charts(runs)),
        settings=_differing_settings(runs),
        notable=lambda run: [event for event in run.events if event["event"] in NOTABLE_EVENTS],
        describe=_describe,
        max_events=MAX_EVENTS,
        max_samples=MAX_SAMPLES,
    )


def _charts(runs: Sequence[RunLog]) -> Iterable[tuple[str, str]]:
    """Titles and SVGs of the charts that have data."""

    def series(event: str, key: str) -> list[Series]:
        return [Series(run.name, _css(i), run.points(event, key)) for i, run in enumerate(runs)]

    loss = []
    for i, run in enumerate(runs):
        points = run.points("train", "loss")
        smooth = run.points("train", "smooth_loss") or ema_smooth(points)
        loss += [Series(f"{run.name}: each step", _css(i), points, faint=True)]
        loss += [Series(f"{run.name}: smoothed", _css(i), smooth)]
    for title, lines in (
        ("training loss", loss),
        ("validation loss", series("eval", "val_loss")),
        ("validation bits per byte", series("eval", "val_bpb")),
        ("learning rate", series("train", "lr")),
        ("gradient norm", series("train", "grad_norm")),
        ("tokens per second", series("train", "tokens_per_second")),
        ("peak memory, GB", series("train", "peak_memory_gb")),
        ("reward", series("train", "reward")),
        ("validation reward", series("eval", "val_reward")),
        ("tokens per completion", series("train", "completion_length")),
        ("validation reward accuracy", series("eval", "val_reward_accuracy")),
        ("ROUGE-L", series("eval", "rougeL")),
    ):
        if svg := line_chart(title, lines):
            yield title, svg


def _css(run: int) -> str:
    return f"c{run % len(PALETTE)}"


def _differing_settings(runs: Sequence[RunLog]) -> list[tuple[str, list[str]]]:
    flat = [{f"{s}.{key}": value for s, keys in run.config.items() for key, value in keys.items()} for run in runs]
    rows = {key: [_plain(settings.get(key)) for settings in flat] for settings in flat for key in settings}
    return [(key, values) for key, values in rows.items() if len(set(values)) > 1]


def _step(run: RunLog) -> str:
    train = run.config.get("train", {})
    total = train.get("total_steps")
    known = isinstance(total, int) and train.get("epochs") is None and train.get("token_budget") is None
    return f"{run.step:,}" + (f" of {total:,}" if known and total else "")


def _last(key: str) -> Callable[[RunLog], str]:
    def number(run: RunLog) -> str:
        value = run.last("train", key)
        return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"

    return number


def _best(key: str) -> Callable[[RunLog], str]:
    return lambda run: "-" if (best := run.best(key)) is None else f"{best[1]:.4f} at step {best[0]:,}"


def _compute(run: RunLog) -> str:
    tflops, share = run.last("train", "tflops"), run.last("train", "peak_share")
    if tflops is None:
        return "-"
    return f"{tflops:.3g} TFLOP/s" + ("" if share is None else f", {share:.0%} of the device's peak")


def _peak_memory(run: RunLog) -> str:
    values = [gb for _, gb in run.points("train", "peak_memory_gb")]  # which starts again when a run resumes
    return f"{max(values):.2f} GB" if values else "-"


def _time_of(event: int) -> Callable[[RunLog], str]:
    def when(run: RunLog) -> str:
        seconds = run.events[event].get("time") if run.events else None
        return "-" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))

    return when


SUMMARY: dict[str, Callable[[RunLog], str]] = {
    "state": lambda run: run.state,
    "step": _step,
    "tokens": _last("tokens"),
    "loss": _last("loss"),
    "best validation loss": _best("val_loss"),
    "best bits per byte": _best("val_bpb"),
    "tokens per second": _last("tokens_per_second"),
    "compute": _compute,
    "peak memory": _peak_memory,
    "started": _time_of(0),
    "last event": _time_of(-1),
}


def _describe(event: dict[str, Any]) -> str:
    """The text of a notable event."""
    kind = event["event"]
    if kind == "skip":
        why = "its gradient was far above the mean" if event.get("reason") == "spike" else "its gradient was not finite"
        return f"update skipped: {why} (loss {_rounded(event.get('loss'))}, norm {_rounded(event.get('grad_norm'))})"
    if kind == "resume":
        reason, changed = event.get("reason") or f"resumed from {event.get('folder', '-')}", event.get("changed")
        if not isinstance(changed, dict) or not changed:
            return str(reason)
        lines = [f"{key} {' to '.join(map(_plain, x if isinstance(x, list) else [x]))}" for key, x in changed.items()]
        return f"{reason}; changed: {', '.join(lines)}"
    if kind == "end":
        return "finished" if event.get("finished") else "stopped"
    return str(event.get("text"))


def _rounded(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
