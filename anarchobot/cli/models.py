"""`anarchobot evaluate`, `import` and `fuse`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.export import add_export
from anarchobot.cli.parser import HUB_NAME, add_command, add_overrides, check_output, non_negative, overrides, positive
from anarchobot.cli.results import log_to, print_result
from anarchobot.config.errors import UserError
from anarchobot.storage.durable import parse_json

if TYPE_CHECKING:
    from anarchobot.evaluation.comparison import Report

DATA_FLAGS = "--shards, --text, --chats, --preferences or --tasks"


def add_commands(commands: Any) -> None:
    evaluate = add_command(commands, "evaluate", _evaluate, "measure loss, bits per byte, ROUGE and benchmark scores")
    model = evaluate.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--checkpoint",
        metavar="PATH",
        help=f"run folder, step_… folder, folder of a Hugging Face model or adapter, or {HUB_NAME} "
        "(required unless --compare)",
    )
    model.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two models, or JSON files from evaluate --output (required unless --checkpoint)",
    )
    evaluate.add_argument(
        "--model", metavar="PATH", help="base model, if --checkpoint is adapters (default: the one that they name)"
    )
    evaluate.add_argument(
        "--shards", metavar="DIR", help="evaluate on the validation split of token shards (default: none)"
    )
    evaluate.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluate on .txt, .jsonl or .parquet files (default: none)",
    )
    evaluate.add_argument(
        "--chats",
        "--rouge",
        metavar="FILE",
        help="answer a file of conversations; measures the loss of its answers, and ROUGE (default: none)",
    )
    evaluate.add_argument(
        "--preferences", metavar="FILE", help="score the pairs of answers in a file of preferences (default: none)"
    )
    evaluate.add_argument(
        "--tasks", metavar="NAMES", help="comma-separated lm-evaluation-harness tasks (default: none)"
    )
    evaluate.add_argument("--include", metavar="DIR", help="folder with custom task files (default: none)")
    evaluate.add_argument(
        "--num-fewshot", type=non_negative, metavar="N", help="few-shot examples per question (default: the task's)"
    )
    evaluate.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="maximum number of documents, answers, pairs or questions (default: all)",
    )
    evaluate.add_argument(
        "--output",
        metavar="FILE",
        help="write the result as JSON, with the values of each document, answer and question (default: print only)",
    )
    evaluate.add_argument(
        "--page", metavar="FILE", help="write an HTML page with all answers side by side (default: none)"
    )
    add_overrides(evaluate, "generation", unused=["generation.prompt"])

    add_export(commands)

    importer = add_command(commands, "import", _import, "import a Hugging Face model to use or train it")
    importer.add_argument(
        "folder",
        metavar="DIR",
        help=f"folder with config.json, safetensors files and a tokenizer, or {HUB_NAME}",
    )
    importer.add_argument("--output", required=True, metavar="PATH", help="new or empty run folder to write")

    fuse = add_command(commands, "fuse", _fuse, "merge LoRA adapters into their base model")
    fuse.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help=f"run folder, Hugging Face model folder, or {HUB_NAME}",
    )
    fuse.add_argument(
        "--adapter",
        required=True,
        metavar="PATH",
        help=f"run folder trained with lora.r (its best step), adapter folder of mlx-lm or PEFT, or {HUB_NAME}",
    )
    fuse.set_defaults(instead={"--checkpoint": "the base model is named with --model, and the adapters with --adapter"})
    fuse.add_argument("--output", required=True, metavar="DIR", help="new or empty run folder to write")


def _evaluate(args: argparse.Namespace) -> None:
    paths = [args.checkpoint] if args.compare is None else args.compare
    has_data = bool(args.shards or args.text or args.chats or args.preferences or args.tasks)
    only_reports = all(_is_report(path) for path in paths)
    if not has_data and not only_reports:
        raise UserError(f"missing data to evaluate on: expected {DATA_FLAGS}")
    if has_data and only_reports:
        raise UserError("argument --compare: data is not allowed with two .json results")
    if args.model is not None and args.compare is not None:
        raise UserError("argument --model: only with --checkpoint: with --compare, adapters must name their base model")
    if args.settings and not args.chats:
        raise UserError(f"'{args.settings[0]}': only --chats generates answers with these settings")
    for output in (args.output, args.page):
        if output is not None:
            check_output(Path(output))
    from anarchobot.config.loading import load_config
    from anarchobot.system.blas import load_fast_blas

    generation = overrides(args)
    load_config(None, generation)  # before loading the model, to fail early

    load_fast_blas()  # before MLX is imported
    from anarchobot.evaluation.comparison import Report, html_report, json_report, text_report
    from anarchobot.evaluation.evaluate import EvalRequest, check_inputs, evaluate
    from anarchobot.storage.durable import write_atomic

    names = [name for name in (args.tasks or "").split(",") if name]
    request = EvalRequest(
        args.shards, args.text, args.chats, generation, args.preferences, names, args.num_fewshot, args.include,
        args.limit,
    )  # fmt: skip
    log = log_to(args.quiet)
    read = {path: _read_report(path) for path in paths if _is_report(path)}
    check_inputs([path for path in paths if path not in read], request, args.model)
    reports = [read.get(path) or Report(path, evaluate(path, request, log, args.model)) for path in paths]

    print(json_report(reports, units=False) if args.json else text_report(reports), flush=True)
    if args.output is not None:
        write_atomic(Path(args.output), json_report(reports, units=True) + "\n")
    if args.page is not None:
        write_atomic(Path(args.page), html_report(reports))


def _is_report(path: str) -> bool:
    """RUN/best.json and RUN/latest.json refer to checkpoints."""
    return path.endswith(".json") and Path(path).name not in ("best.json", "latest.json")


def _read_report(path: str) -> "Report":
    """Reads the result of `evaluate --output` for one model; raises UserError if it is not one."""
    from anarchobot.evaluation.comparison import from_json

    try:
        return from_json(parse_json(Path(path).read_bytes()))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected a result of anarchobot evaluate --output") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a result of anarchobot evaluate --output for one model") from error


def _import(args: argparse.Namespace) -> None:
    from anarchobot.exchange.hub import resolve_model
    from anarchobot.exchange.importing import import_model
    from anarchobot.training.display import activity_bar

    folder = resolve_model(args.folder)  # a download has its own bar
    with activity_bar("importing", args.quiet or args.json):
        done = import_model(folder, args.output)
    print_result(args, done, f"{done['output']}: {done['architecture']}, {done['parameters']:,} parameters")


def _fuse(args: argparse.Namespace) -> None:
    from anarchobot.exchange.fusing import fuse

    done = fuse(args.model, args.adapter, args.output)
    step = "" if done["step"] is None else f"; {args.adapter}: step {done['step']}"
    print_result(
        args,
        done,
        f"{done['model']}{step}",
        f"{done['output']}: {done['parameters']:,} parameters, adapters merged into {done['adapted']} matrices",
    )
