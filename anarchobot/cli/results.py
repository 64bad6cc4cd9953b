"""Results and progress of commands, as they are printed."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from anarchobot.config.paths import chat_run_of


def log_to(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def note_chat_run(args: argparse.Namespace) -> None:
    """Names the model that answers, where `train` has made one, if --checkpoint is that of the texts."""
    if (run := chat_run_of(args.checkpoint)) is not None and not (args.quiet or args.json):
        print(f"note: {run} is this model after fine-tuning on conversations", file=sys.stderr)


def print_result(args: argparse.Namespace, result: dict[str, Any], *lines: str) -> None:
    """Prints `result` as JSON, or its warnings and the lines."""
    if args.json:
        print(json.dumps(result))
        return
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join(lines))
