"""`anarchobot selftest`."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from anarchobot.cli.parser import add_command
from anarchobot.config.errors import UserError


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands, "selftest", _selftest, "try out on this machine what a run survives: kills, damage, a failing disk"
    )
    parser.add_argument(
        "--faults", action="store_true", required=True, help="break small runs and resume them (minutes)"
    )
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="runs to kill (10)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the moments and places (0)")


def _selftest(args: argparse.Namespace) -> int:
    from anarchobot.tasks.selftest import all_faults

    if args.kills < 1:
        raise UserError(f"--kills {args.kills}: expected 1 or more")
    results = []
    with tempfile.TemporaryDirectory(prefix="anarchobot-selftest-") as folder:
        for outcome in all_faults(Path(folder) / "play", args.kills, args.seed):
            results.append(outcome)
            if args.json:
                continue
            if not args.quiet:
                survived = outcome.tried - len(outcome.failures)
                print(f"{outcome.fault:42} {survived} of {outcome.tried} survived{outcome.note}", flush=True)
            for failure in outcome.failures:
                print(f"  {failure}")
    if args.json:
        print(json.dumps([vars(outcome) for outcome in results]))
    return 1 if any(outcome.failures for outcome in results) else 0
