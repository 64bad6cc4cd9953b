"""`anarchobot verify`."""

import argparse
import json
from dataclasses import asdict
from typing import Any

from anarchobot.cli.parser import add_command, add_config

COUNTED = {"pass": "passed", "warn": "warned", "fail": "failed", "skip": "skipped"}


def add_commands(commands: Any) -> None:
    summary = "check machine, configuration, data and folders before a run"
    parser = add_command(
        commands, "verify", _verify, summary, epilog="Exit codes: 0 nothing failed, 1 something did, 2 a wrong call."
    )
    add_config(parser)
    parser.add_argument("--no-calibration", action="store_true", help="measure no steps: the run's time stays unknown")


def _verify(args: argparse.Namespace) -> int:
    from anarchobot.preflight.verify import verify

    # The settings as they are: `overrides` would import what may be missing.
    checks = verify(args.config, args.settings, calibrate=not args.no_calibration)
    counts = {word: sum(check.status == status for check in checks) for status, word in COUNTED.items()}
    if args.json:
        print(json.dumps({**counts, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            if args.quiet and check.status in ("pass", "skip"):
                continue
            print(f"{check.status}  {check.name.ljust(width)}  {check.found}")
            if check.advice:
                print(f"{'':{width + 6}}  -> {check.advice}")
        print(", ".join(f"{number} {word}" for word, number in counts.items()))
    return int(counts["failed"] > 0)
