"""`anarchobot report` and `anarchobot runs`."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command, check_output
from anarchobot.config.errors import UserError

if TYPE_CHECKING:
    from anarchobot.runs.run_log import RunLog


def add_commands(commands: Any) -> None:
    report = add_command(commands, "report", _report, "one HTML page on one or several runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are laid over each other")
    report.add_argument("--output", metavar="FILE", help="where to write it (default: report.html in the first run)")
    runs = add_command(commands, "runs", _runs, "the runs in a folder, with their last figures")
    runs.add_argument("dir", nargs="?", default="runs", metavar="DIR", help="a folder with runs in it (default: runs)")


def _report(args: argparse.Namespace) -> None:
    from anarchobot.reporting.html_report import render_report
    from anarchobot.runs.run_log import read_run
    from anarchobot.storage.durable import write_atomic

    found = [read_run(folder) for folder in args.runs]
    output = Path(args.output) if args.output else found[0].folder / "report.html"
    check_output(output)
    write_atomic(output, render_report(found))
    print(json.dumps({"report": str(output)}) if args.json else output)


def _runs(args: argparse.Namespace) -> None:
    from anarchobot.runs.run_log import find_runs

    found = list(find_runs(args.dir))
    if args.json:
        print(json.dumps([_figures(run) for run in found], indent=1))
        return
    if not found:
        raise UserError(f"{args.dir}: no runs here: expected folders that `anarchobot pretrain` has written")
    rows = [["run", "state", "step", "loss", "best validation loss", "bits per byte", "tokens/s", "last line"]]
    for run in found:
        figures = _figures(run)
        numbers = [figures[key] for key in ("loss", "best_val_loss", "best_val_bpb")]
        shown = ["-" if number is None else f"{number:.4f}" for number in numbers]
        speed = "-" if figures["tokens_per_second"] is None else f"{figures['tokens_per_second']:,.0f}"
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(figures["time"])) if figures["time"] else "-"
        rows.append([str(run.folder), run.state, f"{run.step:,}", *shown, speed, last])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _figures(run: "RunLog") -> dict[str, Any]:
    best, bpb = run.best("val_loss"), run.best("val_bpb")
    return {
        "run": str(run.folder),
        "state": run.state,
        "step": run.step,
        "loss": run.last("train", "loss"),
        "best_val_loss": best and best[1],
        "best_step": best and best[0],
        "best_val_bpb": bpb and bpb[1],
        "tokens_per_second": run.last("train", "tokens_per_second"),
        "time": run.events[-1]["time"] if run.events else None,
    }
