"""`anarchobot monitor`: a live view of a run in the terminal, from its log and its process."""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command
from anarchobot.cli.runs import run_metrics
from anarchobot.config.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from anarchobot.reporting.monitor import Monitor, Sample
    from anarchobot.reporting.run_status import RunStatus

REFRESH_SECONDS = 1.0
CURVE_WIDTH = 40  # characters
BARS = "▁▂▃▄▅▆▇█"


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "monitor",
        _monitor,
        "show loss, speed, remaining time and memory of a run while it trains",
        epilog="Ends with the run, or with Ctrl-C, which does not stop the run. Exit code 1: the run died.",
    )
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder (train.save_dir)")
    parser.add_argument("--wait", action="store_true", help="wait for a run to start, and to resume after it died")


def _monitor(args: argparse.Namespace) -> int:
    from anarchobot.reporting.run_status import RunStatus
    from anarchobot.runs.run_log import read_run

    folder = args.run_folder
    if not args.json:
        try:
            _watch(folder, wait=args.wait, quiet=args.quiet)
        except KeyboardInterrupt:
            return 130
    run, status = read_run(folder), RunStatus(folder)
    if args.json:
        print(json.dumps(run_metrics(run) | {"steps": status.steps, "seconds_left": status.seconds_left}))
    else:
        best = f", best validation loss {status.best[1]:.4f} at step {status.best[0]:,}" if status.best else ""
        again = "the same command" if (folder / "train.json").exists() else "--resume-from auto"  # of `train`
        resume = f": {again} resumes it" if run.state == "died" else ""
        print(f"{folder}: {run.state} at step {status.step:,}{best}{resume}")
        if not args.quiet and (folder / "chat" / "config.yaml").exists():
            print(f"the run on conversations: anarchobot monitor {folder / 'chat'}", file=sys.stderr)
    return int(run.state == "died")


def _watch(folder: Path, *, wait: bool, quiet: bool) -> None:
    """Shows the run on stderr until it ends; one that is not running, once. With `wait`, waits for the next one, and
    goes on after a run died. Raises UserError if there is no run."""
    from rich.console import Console

    from anarchobot.reporting.monitor import attach, running_pid
    from anarchobot.reporting.run_status import RunStatus

    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    while True:
        target = attach(folder, wait=wait) if wait or running_pid(folder) is not None else None
        if target is None:
            if not quiet:
                console.print(_table(rows(RunStatus(folder), None, curves=not console.options.ascii_only)))
            return
        if _follow(RunStatus(folder), target, console, quiet) != "died" or not wait:
            return
        console.print(visible(f"{folder}: died; waiting for it to resume"), markup=False)


def _follow(status: "RunStatus", target: "Monitor", console: "Console", quiet: bool) -> str:
    """Shows the run until its process ends: a table on a terminal, otherwise a line for each new step. Returns its
    state."""
    from rich.live import Live

    live, shown = Live(console=console, auto_refresh=False), -1
    if console.is_terminal and not quiet:
        live.start()
    try:
        for sample in target.samples(REFRESH_SECONDS, None):
            status.update()
            lines = rows(status, sample, curves=live.is_started and not console.options.ascii_only)
            if live.is_started:
                live.update(_table(lines), refresh=True)
            elif not quiet and status.step > shown:
                shown = status.step
                console.print(visible(" | ".join(f"{name} {value}" for name, value in lines)), markup=False)
        status.update()
        if live.is_started:
            live.update(_table(rows(status, None, curves=not console.options.ascii_only)), refresh=True)
    finally:
        live.stop()
    return target.state


def rows(status: "RunStatus", sample: "Sample | None", curves: bool) -> list[tuple[str, str]]:
    """Labels and values of what is known. `sample`: None if the run is not running."""
    from anarchobot.training.display import duration

    train, left = status.train, status.seconds_left
    step = f"{status.step:,}" + (f" of {status.steps:,} ({status.step / status.steps:.0%})" if status.steps else "")
    lines = [("step", step + (f", {duration(left)} left" if sample is not None and left is not None else ""))]
    if status.losses:
        smooth = list(status.losses.values())
        lines.append(("loss", f"{smooth[-1]:.4f}" + (_curve(smooth) if curves else "")))
    if status.best is not None:
        (at, last), losses = list(status.evals.items())[-1], [values["val_loss"] for values in status.evals.values()]
        bpb = f" ({last['val_bpb']:.4f} bits per byte)" if "val_bpb" in last else ""
        text = f"{last['val_loss']:.4f}{bpb} at step {at:,}, best {status.best[1]:.4f} at step {status.best[0]:,}"
        lines.append(("validation", text + (_curve(losses) if curves else "")))
    if "tokens_per_second" in train:
        tflops = f", {train['tflops']:.3g} TFLOP/s" if "tflops" in train else ""
        lines.append(("speed", f"{train['tokens_per_second']:,.0f} tokens/s{tflops}"))
    memory = []
    if sample is not None and sample.process_gb is not None:
        memory.append(f"process {sample.process_gb:.2f} GB")
    if "peak_memory_gb" in train:
        memory.append(f"peak of the model {train['peak_memory_gb']:.2f} GB")
    if sample is not None:
        memory.append(f"machine {sample.system_used_gb:.1f} of {sample.system_total_gb:.1f} GB")
    if memory:
        lines.append(("memory", ", ".join(memory)))
    if status.warning:
        lines.append(("warning", status.warning))
    return lines


def _curve(values: list[float]) -> str:
    """A curve of at most CURVE_WIDTH bars; each is the mean of its values."""
    width = min(CURVE_WIDTH, len(values))
    cuts = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in pairwise(cuts)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "  " + "".join(BARS[round((mean - low) * scale)] for mean in means)


def _table(lines: list[tuple[str, str]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False)
    for name, value in lines:
        table.add_row(name, Text(visible(value)))
    return table
