"""Monitors the memory of a run (--run DIR), a process (--pid N), or the machine alone. See docs/monitoring.md.

Exit codes: 0 the run or process ended, or the duration is over; 1 the run died; 2 usage error, such as no such run;
130 stopped by Ctrl-C.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from anarchobot.cli.parser import Parser
from anarchobot.config.errors import UserError, one_line
from anarchobot.config.terminal import visible, visible_output
from anarchobot.reporting.memory_chart import check_plot_path, plot_memory
from anarchobot.reporting.monitor import Alarm, CsvWriter, Monitor, Sample, attach


def main() -> int:
    with visible_output():
        return run()


def run() -> int:
    try:
        return monitor(parse_arguments())
    except UserError as error:
        print(f"memory_monitor: {error}", file=sys.stderr)
    except OSError as error:
        print(one_line(f"memory_monitor: {error.filename or 'system'}: {error.strerror or error}"), file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def parse_arguments() -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = Parser(prog="memory_monitor", description=description, epilog=epilog)
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--run", metavar="DIR", type=Path, help="a run folder (train.save_dir)")
    target.add_argument("--pid", metavar="N", type=int, help="a process")
    parser.add_argument("--wait", action="store_true", help="with --run: wait for a run to start, and after one died")
    parser.add_argument("--interval", metavar="SECONDS", type=float, default=2.0, help="between samples (default: 2)")
    parser.add_argument(
        "--duration", metavar="SECONDS", type=float, help="stop after this time (default: with the run)"
    )
    parser.add_argument("--csv", metavar="FILE", type=Path, help="append a row per sample")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="plot at the end: a .png (matplotlib) or .svg file")
    parser.add_argument("--alarm", metavar="LIMIT", help="ring when memory exceeds this: GB (12), or a share (90%%)")
    parser.add_argument("--quiet", action="store_true", help="no live view, only alarms and the final state")
    args = parser.parse_args()
    for name in ("interval", "duration"):
        if (value := getattr(args, name)) is not None and not 0 < value < 1e9:
            raise UserError(f"--{name} {value:g}: expected seconds above 0")
    if args.wait and args.run is None:
        raise UserError("--wait: requires --run DIR")
    return args


def monitor(args: argparse.Namespace) -> int:
    alarm = Alarm(args.alarm) if args.alarm else None
    if args.plot:
        check_plot_path(args.plot)
    samples: list[Sample] = []
    with View(args.quiet) as view:
        try:
            while True:
                if args.run and args.wait:
                    view.note(f"{args.run}: waiting for a run")
                target = attach(args.run, wait=args.wait, timeout=args.duration) if args.run else Monitor(args.pid)
                if target is None:
                    view.note(f"{args.run}: no run started")
                    return 0
                state = follow(target, args, alarm, samples, view)
                if state != "died" or not args.wait:
                    break
                view.note(f"{args.run}: died; waiting for it to resume")
        finally:
            if args.plot and samples:
                plot_memory(args.plot, samples)
    if args.run or args.pid:
        print(f"{args.run or args.pid}: {'still ' if state == 'running' else ''}{state}", file=sys.stderr)
    return int(state == "died")


def follow(target: Monitor, args: argparse.Namespace, alarm: Alarm | None, samples: list[Sample], view: "View") -> str:
    """Samples until the target ends or the duration is over. Returns its state."""
    table = CsvWriter(args.csv) if args.csv else None
    try:
        for sample in target.samples(args.interval, args.duration):
            view.show(sample)
            if args.plot:
                samples.append(sample)
            if table:
                table.add(sample)
            if alarm and (message := alarm.message(sample)):
                view.note(message, ring=True)
    finally:
        if table:
            table.close()
    return target.state


class View:
    """A live table on a terminal; otherwise one line per sample."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.console = quiet, Console(file=sys.stderr, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=False)

    def __enter__(self) -> "View":
        if self.console.is_terminal and not self.quiet:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.stop()

    def show(self, sample: Sample) -> None:
        if self.quiet:
            return
        if self.live.is_started:
            table = Table(box=None, show_header=False)
            for name, value in rows(sample):
                table.add_row(name, value)
            self.live.update(table, refresh=True)
        else:
            print("  ".join(f"{name} {value}" for name, value in rows(sample)), file=sys.stderr, flush=True)

    def note(self, line: str, ring: bool = False) -> None:
        self.console.print(visible(line), markup=False, soft_wrap=True)
        if ring:
            self.console.bell()


def rows(sample: Sample) -> list[tuple[str, str]]:
    """Labels and values of what is known."""
    used, total = sample.system_used_gb, sample.system_total_gb
    found = [("machine", f"{used:.2f} of {total:.2f} GB ({used / total:.0%})")]
    if sample.pressure:
        found.append(("pressure", sample.pressure))
    found.append(("swap", f"{sample.swap_used_gb:.2f} GB"))
    if sample.process_gb is not None:
        found.insert(0, ("process", f"{sample.process_gb:.2f} GB"))
    mlx = [
        f"{name} {value:.2f}"
        for name in ("active", "peak", "cache")
        if (value := getattr(sample, f"{name}_memory_gb")) is not None
    ]
    if mlx:
        found.append(("MLX", f"{', '.join(mlx)} GB"))
    if sample.step is not None:
        found.append(("step", f"{sample.step:,}, {sample.tokens_per_second or 0:,.0f} tokens/s"))
    return found


if __name__ == "__main__":
    sys.exit(main())
