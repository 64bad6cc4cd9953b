"""`anarchobot adapt-vocab`."""

import argparse
import json
import sys
from typing import Any

from anarchobot.cli.parser import add_command, add_config, overrides


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "adapt-vocab", _adapt, "move a model to another vocabulary, and train it there")
    add_config(parser)


def _adapt(args: argparse.Namespace) -> int:
    from anarchobot.config.adapt_schema import AdaptConfig
    from anarchobot.config.loading import load
    from anarchobot.system.blas import load_fast_blas

    loaded = load(args.config, overrides(args), AdaptConfig)
    load_fast_blas()  # before MLX is imported
    from anarchobot.tasks.adaptation.evaluation import table
    from anarchobot.tasks.adaptation.pipeline import adapt_vocab

    report = adapt_vocab(loaded, quiet=args.quiet or args.json)
    if args.json:
        print(json.dumps(report, ensure_ascii=False))
    elif not args.quiet and report["evaluation"]:
        print(table(report["evaluation"]))
    if not report["finished"]:
        print("stopped; go on with the same command", file=sys.stderr)
        return 130
    if not (args.quiet or args.json):
        print(f"{report['result']}: the adapted model")
    return 0
