"""`anarchobot train`: from a folder of text to a model, in a given time."""

import argparse
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from anarchobot.cli.parser import HUB_NAME, KEY_VALUE, add_command, parse
from anarchobot.config.errors import UserError

DEFAULT_SECONDS = 1800.0
UNITS = {"s": 1, "m": 60, "h": 3600}
NUMBER = r"([0-9]{1,6}(?:\.[0-9]{1,6})?)"
WHY_NO_SETTINGS = (
    "train chooses the settings: to change one, edit a copy of config.yaml from its output folder and run anarchobot "
    "pretrain with it"
)


_TEXTS = "texts are named without a flag, and conversations with --chat"
INSTEAD = {  # of flags elsewhere
    **dict.fromkeys(("--dataset", "--data", "--input", "--text", "--texts", "--file", "--files"), _TEXTS),
    **dict.fromkeys(("--hours", "--minutes", "--duration"), "did you mean '--time'?"),
}


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "train a model on your texts in a given time",
        epilog="Settings are chosen for the text, the time and this machine (docs/train.md). Ctrl-C stops; the same "
        "command resumes.",
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXTS",
        help="text, JSONL, Parquet, PDF, DOCX, EPUB, HTML or PPTX files, folders or globs (default: none)",
    )
    parser.add_argument(
        "--time",
        metavar="T",
        help="total time, such as 90s, 30m or 2h (default: 30m; to resume, that of the run)",
    )
    parser.add_argument(
        "--chat",
        metavar="FILE",
        help="conversations to fine-tune on afterwards (default: no fine-tuning; to resume, those of the run)",
    )
    parser.add_argument(
        "--model",
        metavar="PATH",
        help=f"model to train LoRA adapters for: a run, a folder, or {HUB_NAME} (default: train a new model)",
    )
    parser.set_defaults(why_no_settings=WHY_NO_SETTINGS, instead=INSTEAD)
    parser.add_argument("--output", metavar="DIR", help="output folder (default: runs/NAME, after the first text)")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and write nothing")


def _train(args: argparse.Namespace) -> int:
    started = time.monotonic()
    seconds = None if args.time is None else parse_seconds(args.time)
    for word in args.texts:
        if KEY_VALUE.match(word) and not Path(word).exists():
            raise UserError(f"'{word}': {WHY_NO_SETTINGS}")
    if not args.texts and not (args.model and args.chat):
        raise UserError(
            "missing TEXTS: expected text files or folders, such as `anarchobot train notes` (with --model, --chat "
            "is enough)"
        )
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.tasks import train

    silent = args.quiet or args.json

    def log(line: str) -> None:
        if not silent:
            print(line, file=sys.stderr, flush=True)

    output = _output(args)
    planned, planned_chat = train.planned(output)
    seconds = seconds or planned or DEFAULT_SECONDS
    if planned not in (None, seconds):
        output, planned_chat = _other_output(args, output, planned, seconds, log), None
    request = train.Request(args.texts, seconds, args.chat or planned_chat, args.model, output)
    is_started = train.is_started(request, log)
    is_finished = is_started and train.is_finished(request)
    if is_started:
        state = "finished" if is_finished else "would be resumed" if args.dry_run else "resuming"
        log(f"{request.output}: {state}")
        if args.dry_run:
            return 0
    else:
        log("reading the texts and measuring this machine" if args.texts else "reading the conversations")
        plan = train.plan(request, started)
        if args.dry_run and args.json:
            print(json.dumps({"plan": dict(plan.table), "config": plan.sections}))
        elif args.dry_run or not silent:
            lines = _table([*plan.table, ("output", str(output))])
            print("\n".join(lines), file=sys.stdout if args.dry_run else sys.stderr, flush=True)
        for note in plan.notes:
            log(note)
    if args.dry_run:
        log("the plan follows from the speed of this machine, measured just now: it may differ the next time")
        return 0
    if not is_started:
        train.start(request, plan)
    try:
        result = train.train(request, started, "nothing" if silent else "brief", log)
    except train.Stopped:
        print("stopped; resume with the same command", file=sys.stderr)
        return 130
    opens_chat = bool(result["chat"]) and sys.stdin.isatty() and not silent
    if args.json:
        print(json.dumps(result | {"commands": list(train.commands(request))}))
    else:
        _print_result(args, result, opens_chat, is_finished)
    if opens_chat:
        chat = parse(args.parser, ["chat", "--checkpoint", result["chat"]])
        return int(chat.run(chat) or 0)
    return 0


def parse_seconds(text: str) -> float:
    """Parses `90s`, `30m`, `2h` or `1h30m`. Raises UserError for anything else."""
    match = re.fullmatch(rf"(?:{NUMBER}h)?(?:{NUMBER}m)?(?:{NUMBER}s)?", text)
    parts = zip("hms", match.groups(default="0"), strict=True) if match else ()
    seconds = sum(float(number) * UNITS[unit] for unit, number in parts)
    if seconds == 0:
        like = re.fullmatch(rf"{NUMBER} ?(|s|secs?|seconds?|m|mins?|minutes?|h|hrs?|hours?)", text.lower())
        near = f"; did you mean '{like[1]}{like[2][:1] or 'm'}'?" if like and float(like[1]) else ""
        raise UserError(f"argument --time: expected a time such as 90s, 30m or 2h, got '{text}'{near}")
    return seconds


def _output(args: argparse.Namespace) -> Path:
    if args.output is not None:
        return Path(args.output)
    first = Path(args.texts[0] if args.texts else args.chat).absolute()
    # Of a glob, the folder before it; of a link, its own name.
    named = [part for part in Path(os.path.normpath(first)).parts if not re.search(r"[*?\[]", part)]
    return Path("runs") / named[-1].partition(".")[0]


def _other_output(
    args: argparse.Namespace, output: Path, planned: float, seconds: float, log: Callable[[str], None]
) -> Path:
    """The folder for a run of another time than that of the run in `output`: settings are chosen for the time. Raises
    UserError if the user has chosen `output`."""
    before, now = format_seconds(planned), format_seconds(seconds)
    other = output.with_name(f"{output.name}-{now}")
    if args.output is not None:
        raise UserError(
            f"--output {output}: has a run of --time {before}: resume it without --time, or train a new model, chosen "
            f"for {now}, with --output {other}"
        )
    log(f"{output}: has a run of --time {before}, which is kept; a new model, chosen for {now}, goes to {other}")
    return other


def format_seconds(seconds: float) -> str:
    """`90s`, `30m`, `2h`: as `parse_seconds` reads it, in the largest unit without a fraction."""
    unit = next((unit for unit in "hm" if seconds % UNITS[unit] == 0), "s")
    return f"{seconds / UNITS[unit]:g}{unit}"


def _table(rows: list[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{name.ljust(width)}  {value}" for name, value in rows]


def _before(value: float | None) -> str:
    return "" if value is None else f" ({value:.4f} before)"


def _print_result(args: argparse.Namespace, result: dict[str, Any], opens_chat: bool, was_finished: bool) -> None:
    """Without the sample if the run `was_finished` before this command."""
    if result["best_val_bpb"] is not None:
        print(
            f"{result['model']}: {result['best_val_bpb']:.4f} bits per byte on held-out text (lower is better)"
            + _before(result["val_bpb_before"])
        )
    if result["chat_val_loss"] is not None:
        print(
            f"{result['chat']}: loss {result['chat_val_loss']:.4f} on held-out conversations"
            + _before(result["chat_val_loss_before"])
        )
    elif result["chat"]:
        print(f"chat: {result['chat']}")
    for name in ("samples", "report"):
        print(f"{name}: {result[name]}")
    if args.quiet:
        return
    for line in result["not_read"]:
        print(line, file=sys.stderr)
    if not was_finished:
        from anarchobot.tasks.training_samples import SEPARATOR

        sample, *_ = Path(result["samples"]).read_text(encoding="utf-8").split(SEPARATOR)
        print(f"\nsample:\n{sample.strip()}\n", file=sys.stderr)
    use = f"chat --checkpoint {shlex.quote(result['chat'])}" if result["chat"] else (
        f"generate --checkpoint {shlex.quote(result['model'])}"
    )  # fmt: skip
    print(f"{'opening' if opens_chat else 'next'}: anarchobot {use}", file=sys.stderr)
