"""Runs as one HTML page that needs nothing else: no script, no font, no picture from anywhere."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

from anarchobot.reporting.chart import Line, chart, smoothed
from anarchobot.runs.run_log import RunLog

COLOURS = 8  # runs that are told apart; further ones begin anew
SAMPLES = 6  # of a run: its last ones
EVENTS = 200  # of a run, in full; further ones are counted

STYLE = """
:root{--ink:#1b1f24;--paper:#fff;--soft:#5b6470;--rule:#d9dee4;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--paper:#14171b;--soft:#9aa4b0;--rule:#343b44;--card:#1c2127}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1200px;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}h3{font-size:1rem;margin:.2rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{border-bottom:1px solid var(--rule);padding:.25rem .8rem .25rem 0;text-align:left;vertical-align:top}
.wide{overflow-x:auto;margin-bottom:1rem}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:1rem}
.chart{background:var(--card);border-radius:8px;padding:.6rem .8rem}
svg{width:100%;height:auto}svg text{font:13px system-ui,sans-serif;fill:var(--soft)}
.grid{stroke:var(--rule)}.line{fill:none;stroke-width:1.6}.faint{opacity:.3}circle.line{stroke-width:3}
pre{background:var(--card);border-radius:8px;padding:.8rem;overflow-x:auto;white-space:pre-wrap}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}.soft{color:var(--soft)}
summary{cursor:pointer}
"""
PALETTE = ("#2563eb", "#d9480f", "#2b8a3e", "#9c36b5", "#c2255c", "#0b7285", "#8a6d00", "#5f3dc4")


def page(runs: Sequence[RunLog]) -> str:
    """The whole document. What runs wrote is shown as text, whatever it looks like."""
    colours = "".join(f".c{i}{{stroke:{c};background:{c}}}" for i, c in enumerate(PALETTE))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        f"<h1>{escape(title)}</h1>",
        _summary(runs),
        f'<div class="charts">{"".join(_charts(runs))}</div>',
        _settings(runs),
        *(_details(run, i, len(runs) > 1) for i, run in enumerate(runs)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}{colours}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _summary(runs: Sequence[RunLog]) -> str:
    rows: dict[str, Callable[[RunLog], str]] = {
        "state": lambda run: run.state,
        "step": lambda run: f"{run.step:,}" + (f" of {total:,}" if (total := _total(run)) else ""),
        "tokens": lambda run: _number(run.last("train", "tokens")),
        "loss": lambda run: _number(run.last("train", "loss")),
        "best validation loss": lambda run: _best(run, "val_loss"),
        "best bits per byte": lambda run: _best(run, "val_bpb"),
        "tokens per second": lambda run: _number(run.last("train", "tokens_per_second")),
        "computing": _computing,
        "peak memory": lambda run: f"{gb:.2f} GB" if (gb := run.last("train", "peak_memory_gb")) is not None else "-",
        "began": lambda run: _when(run.events[0]["time"]) if run.events else "-",
        "last line": lambda run: _when(run.events[-1]["time"]) if run.events else "-",
    }
    head = "".join(f'<th><span class="key c{i % COLOURS}"></span>{escape(run.name)}</th>' for i, run in enumerate(runs))
    lines = [
        f"<tr><td>{name}</td>{''.join(f'<td>{escape(of(run))}</td>' for run in runs)}</tr>" for name, of in rows.items()
    ]
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


def _computing(run: RunLog) -> str:
    tflops, share = run.last("train", "tflops"), run.last("train", "peak_share")
    if tflops is None:
        return "-"
    return f"{tflops:.3g} TFLOP/s" + ("" if share is None else f", {share:.0%} of the device's peak")


def _charts(runs: Sequence[RunLog]) -> Iterable[str]:
    def lines(event: str, key: str) -> list[Line]:
        return [Line(run.name, f"c{i % COLOURS}", run.points(event, key)) for i, run in enumerate(runs)]

    loss = []
    for i, run in enumerate(runs):
        points, css = run.points("train", "loss"), f"c{i % COLOURS}"
        loss += [
            Line(f"{run.name}: each", css, points, faint=True),
            Line(f"{run.name}: smoothed", css, run.points("train", "smooth_loss") or smoothed(points)),
        ]
    for title, of in (
        ("training loss", loss),
        ("validation loss", lines("eval", "val_loss")),
        ("validation bits per byte", lines("eval", "val_bpb")),
        ("learning rate", lines("train", "lr")),
        ("gradient norm", lines("train", "grad_norm")),
        ("tokens per second", lines("train", "tokens_per_second")),
        ("peak memory, GB", lines("train", "peak_memory_gb")),
        ("reward accuracy, held out", lines("eval", "val_reward_accuracy")),
        ("ROUGE-L", lines("eval", "rougeL")),
    ):
        if drawn := chart(title, of):
            yield f'<div class="chart"><h3>{title}</h3>{drawn}</div>'


def _settings(runs: Sequence[RunLog]) -> str:
    """The settings that differ, for several runs."""
    if len(runs) == 1:
        return ""
    flat = [{f"{s}.{key}": value for s, keys in run.config.items() for key, value in keys.items()} for run in runs]
    keys = [
        key for key in dict.fromkeys(key for one in flat for key in one) if len({_text(o.get(key)) for o in flat}) > 1
    ]
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    rows = "".join(
        f"<tr><td>{escape(key)}</td>{''.join(f'<td>{escape(_text(one.get(key)))}</td>' for one in flat)}</tr>"
        for key in keys
    )
    return f'<h2>Settings that differ</h2><div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _details(run: RunLog, number: int, named: bool) -> str:
    saves = run.of("save")
    told = [line for line in run.events if line["event"] in ("skip", "resume", "warning", "end")]
    lines = "".join(
        f"<tr><td>{line['step']:,}</td><td>{escape(line['event'])}</td><td>{escape(_values(line))}</td></tr>"
        for line in told[-EVENTS:]
    )
    more = f"<p>{len(told) - EVENTS:,} earlier ones are in metrics.jsonl.</p>" if len(told) > EVENTS else ""
    torn = f"<p>{run.torn} lines of the log were cut off by a kill.</p>" if run.torn else ""
    samples = "".join(
        f"<h3>step {line['step']:,}</h3><pre>{escape(str(line.get('text', '')))}</pre>"
        for line in run.of("sample")[-SAMPLES:]
    )
    config = "\n".join(
        f"{section}:\n" + "\n".join(f"  {key}: {_text(value)}" for key, value in keys.items())
        for section, keys in run.config.items()
    )
    environment = "".join(
        f"<tr><td>{escape(str(key))}</td><td>{escape(_text(value))}</td></tr>"
        for key, value in run.environment.items()
        if key != "made of"
    )
    made_of = "".join(f"<li>{escape(str(line))}</li>" for line in run.environment.get("made of", []))
    title = f'<h2><span class="key c{number % COLOURS}"></span>{escape(run.name)}</h2>' if named else ""
    parts = [
        title,
        f"<h2>Model and data</h2><ul>{made_of}</ul>" if made_of else "",
        f"<h2>Events</h2><p>{len(saves)} checkpoints saved"
        + (f", the last at step {saves[-1]['step']:,}" if saves else "")
        + f'.</p>{more}{torn}<div class="wide"><table>{lines}</table></div>',
        f"<h2>Samples</h2>{samples}" if samples else "",
        f"<h2>Environment</h2><table>{environment}</table>" if environment else "",
        f"<h2>Configuration</h2><details><summary>{escape(str(run.folder / 'config.yaml'))}</summary>"
        f"<pre>{escape(config)}</pre></details>",
    ]
    return "".join(parts)


def _total(run: RunLog) -> int | None:
    total = run.config.get("train", {}).get("total_steps")
    train = run.config.get("train", {})
    given_in_data = train.get("epochs") is not None or train.get("token_budget") is not None
    return total if isinstance(total, int) and not given_in_data else None


def _best(run: RunLog, key: str) -> str:
    best = run.best(key)
    return "-" if best is None else f"{best[1]:.4f} at step {best[0]:,}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _values(line: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in line.items() if key not in ("step", "event", "time"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
