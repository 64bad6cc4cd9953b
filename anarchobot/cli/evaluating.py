"""`anarchobot evaluate`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from anarchobot.cli.parser import add_command, check_output
from anarchobot.config.errors import UserError


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "evaluate", _evaluate, "loss, bits per byte, ROUGE and benchmark tasks of a model")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", metavar="PATH", help="a run or step folder, or a Hugging Face model's")
    which.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two models, or the .json files of earlier evaluations"
    )
    parser.add_argument("--shards", metavar="DIR", help="the validation split of token shards")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help=".txt, .jsonl or .parquet files")
    parser.add_argument("--rouge", metavar="FILE", help="conversations or questions with answers, to be answered anew")
    parser.add_argument("--tasks", metavar="NAMES", help="lm-evaluation-harness tasks, with commas between")
    parser.add_argument("--include", metavar="DIR", help="a folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question of a task")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many documents, answers or questions")
    parser.add_argument("--output", metavar="FILE", help="write the result here, as JSON")


def _evaluate(args: argparse.Namespace) -> None:
    paths = [args.checkpoint] if args.compare is None else args.compare
    asked = bool(args.shards or args.text or args.rouge or args.tasks)
    if not asked and not all(_is_report(path) for path in paths):
        raise UserError(
            "evaluate on what? Expected --shards, --text, --rouge or --tasks (see anarchobot evaluate --help)"
        )
    if asked and all(_is_report(path) for path in paths):
        raise UserError("--compare: earlier evaluations are compared as they are: leave out what to evaluate on")
    if args.output is not None:
        check_output(Path(args.output))
    for flag, number in (("--limit", args.limit), ("--num-fewshot", args.num_fewshot)):
        if number is not None and number < (0 if flag == "--num-fewshot" else 1):
            raise UserError(f"argument {flag}: expected a whole number of at least 1, got {number}")
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.evaluation.evaluate import EvalRequest, evaluate, metrics_table
    from anarchobot.storage.durable import write_atomic

    names = [name for name in (args.tasks or "").split(",") if name]
    request = EvalRequest(args.shards, args.text, args.rouge, names, args.num_fewshot, args.include, args.limit)
    reports = [_report(path) if _is_report(path) else evaluate(path, request, _say(args.quiet)) for path in paths]
    result = json.dumps(reports[0] if len(reports) == 1 else reports, indent=1)
    print(result if args.json else metrics_table(reports), flush=True)
    if args.output is not None:
        write_atomic(Path(args.output), result + "\n")


def _say(quiet: bool) -> Any:
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def _is_report(path: str) -> bool:
    """RUN/best.json and RUN/latest.json are models: they name a step."""
    return path.endswith(".json") and Path(path).name not in ("best.json", "latest.json")


def _report(path: str) -> dict[str, Any]:
    """An earlier evaluation of one model. Raises UserError when it is none."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(report["checkpoint"], str) and isinstance(report["results"], dict):
            return dict(report)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file: expected what anarchobot evaluate --output wrote") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}: not the result of an evaluation of one model (anarchobot evaluate --output)")
