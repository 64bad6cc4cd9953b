"""`anarchobot report` and `runs`."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command, check_output
from anarchobot.config.errors import UserError
from anarchobot.config.paths import chat_run_of

if TYPE_CHECKING:
    from anarchobot.runs.run_log import RunLog


def add_commands(commands: Any) -> None:
    report = add_command(commands, "report", _report, "write an HTML report on one or several runs")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folders; several are shown in the same charts")
    report.add_argument("--output", metavar="FILE", help="file to write (default: report.html in the first run)")
    runs = add_command(commands, "runs", _runs, "list the runs in a folder with their latest metrics")
    runs.add_argument("dir", nargs="?", default="runs", metavar="DIR", help="folder that contains run folders")


def _report(args: argparse.Namespace) -> None:
    from anarchobot.reporting.html_report import render_report
    from anarchobot.runs.run_log import read_run
    from anarchobot.storage.durable import write_atomic

    folders = {part: None for folder in args.runs for part in (folder, chat_run_of(folder)) if part is not None}
    runs = [read_run(folder) for folder in folders]
    output = Path(args.output) if args.output else runs[0].folder / "report.html"
    check_output(output)
    write_atomic(output, render_report(runs))
    print(json.dumps({"report": str(output)}) if args.json else output)


def _runs(args: argparse.Namespace) -> None:
    from anarchobot.runs.run_log import find_runs

    runs = list(find_runs(args.dir))
    if args.json:
        print(json.dumps([run_metrics(run) for run in runs], indent=1))
        return
    if not runs:
        raise UserError(f"{args.dir}: no runs found; expected folders written by anarchobot pretrain")
    rows = [["run", "state", "step", "loss", "best val loss", "bits per byte", "tokens/s", "last update"]]
    for run in runs:
        metrics = run_metrics(run)
        losses = [metrics[key] for key in ("loss", "best_val_loss", "best_val_bpb")]
        shown = ["-" if loss is None else f"{loss:.4f}" for loss in losses]
        speed = "-" if metrics["tokens_per_second"] is None else f"{metrics['tokens_per_second']:,.0f}"
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(metrics["time"])) if metrics["time"] else "-"
        rows.append([str(run.folder), run.state, f"{run.step:,}", *shown, speed, last])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def run_metrics(run: "RunLog") -> dict[str, Any]:
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
        "time": run.events[-1].get("time") if run.events else None,
    }
