"""Results and progress of commands, as they are printed."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any


def log_to(quiet: bool) -> Callable[[str], None]:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def print_result(args: argparse.Namespace, result: dict[str, Any], *lines: str) -> None:
    """Prints `result` as JSON, or its warnings and the lines."""
    if args.json:
        print(json.dumps(result))
        return
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print("\n".join(lines))
