"""`anarchobot fuse`."""

import argparse
import json
import sys
from typing import Any

from anarchobot.cli.parser import add_command


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "fuse", _fuse, "join a model and its adapters (LoRA) into one model")
    parser.add_argument(
        "--model", required=True, metavar="PATH", help="the model: a run folder or a Hugging Face model's folder"
    )
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="PATH",
        help="its adapters: a run with lora.r (its best step), or mlx-lm's or PEFT's folder",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the run folder to write; new or empty")


def _fuse(args: argparse.Namespace) -> None:
    from anarchobot.exchange.fusing import fuse

    done = fuse(args.model, args.adapter, args.output)
    if args.json:
        print(json.dumps(done))
        return
    for warning in done["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if not args.quiet:
        step = "" if done["step"] is None else f"; {args.adapter}: step {done['step']}"
        print(f"{done['model']}{step}")
        print(f"{done['output']}: {done['parameters']:,} parameters, adapters in {done['adapted']} matrices")
