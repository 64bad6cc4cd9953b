"""Memory, live: of a run (--run DIR), of a process (--pid N), or of the machine alone. See docs/monitoring.md.

Exit codes: 0 what was watched has ended, or the duration is over; 1 the run died; 2 a mistake of yours, such as no run;
130 stopped by Ctrl-C.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from anarchobot.cli.parser import Parser
from anarchobot.config.errors import UserError
from anarchobot.reporting import memory_chart
from anarchobot.reporting.monitor import Alarm, Csv, Sample, Watched, find_run


def main() -> int:
    try:
        return watch(arguments())
    except UserError as error:
        print(f"memory_monitor: {error}", file=sys.stderr)
    except OSError as error:
        print(f"memory_monitor: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


def arguments() -> argparse.Namespace:
    description, _, epilog = (__doc__ or "").partition("\n\n")
    parser = Parser(prog="memory_monitor", description=description, epilog=epilog)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", metavar="DIR", type=Path, help="a run's folder (its train.save_dir)")
    what.add_argument("--pid", metavar="N", type=int, help="a process")
    parser.add_argument("--wait", action="store_true", help="with --run: wait for a run to begin, also after one died")
    parser.add_argument("--interval", metavar="SECONDS", type=float, default=2.0, help="between two looks (default: 2)")
    parser.add_argument("--duration", metavar="SECONDS", type=float, help="end after this time (default: with the run)")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="append a row at each look")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw it at the end: a .png (matplotlib) or .svg file"
    )
    parser.add_argument("--alarm", metavar="LIMIT", help="ring when memory comes above: GB (12), or a share (90%%)")
    parser.add_argument("--quiet", action="store_true", help="no live view: only alarms and the end")
    args = parser.parse_args()
    for name in ("interval", "duration"):
        if (value := getattr(args, name)) is not None and not 0 < value < 1e9:
            raise UserError(f"--{name} {value:g}: expected seconds above 0")
    if args.wait and args.run is None:
        raise UserError("--wait: wait for what? Give --run DIR")
    return args


def watch(args: argparse.Namespace) -> int:
    alarm = Alarm(args.alarm) if args.alarm else None
    if args.plot:
        memory_chart.check(args.plot)
    seen: list[Sample] = []
    with View(args.quiet) as view:
        try:
            while True:
                if args.run and args.wait:
                    view.note(f"{args.run}: waiting for a run")
                found = find_run(args.run, wait=args.wait, seconds=args.duration) if args.run else Watched(args.pid)
                if found is None:
                    view.note(f"{args.run}: no run has begun")
                    return 0
                watched = found
                ended = follow(watched, args, alarm, seen, view)
                if ended != "died" or not args.wait:
                    break
                view.note(f"{args.run}: died; waiting for it to go on")
        finally:
            if args.plot and seen:
                memory_chart.draw(args.plot, seen)
    if args.run or args.pid:
        print(f"{args.run or args.pid}: {'still ' if ended == 'running' else ''}{ended}", file=sys.stderr)
    return int(ended == "died")


def follow(watched: Watched, args: argparse.Namespace, alarm: Alarm | None, seen: list[Sample], view: "View") -> str:
    """Until what is watched ends, or the time is over; says which."""
    table = Csv(args.csv) if args.csv else None
    try:
        for sample in watched.samples(args.interval, args.duration):
            view.show(sample)
            if args.plot:
                seen.append(sample)
            if table:
                table.add(sample)
            if alarm and (line := alarm.crossed(sample)):
                view.note(line, ring=True)
    finally:
        if table:
            table.close()
    return watched.end


class View:
    """A live table on a terminal; a line a look where there is none."""

    def __init__(self, quiet: bool) -> None:
        self.quiet, self.console = quiet, Console(stderr=True, highlight=False)
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
        self.console.print(line, markup=False, soft_wrap=True)
        if ring:
            self.console.bell()


def rows(sample: Sample) -> list[tuple[str, str]]:
    """What is known, in words."""
    machine = f"{sample.system_used_gb:.2f} of {sample.system_total_gb:.2f} GB"
    found = [("machine", f"{machine} ({sample.system_used_gb / sample.system_total_gb:.0%})")]
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
