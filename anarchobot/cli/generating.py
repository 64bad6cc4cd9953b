"""`anarchobot generate`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import Parser, add_command, add_settings, overrides
from anarchobot.config.errors import UserError

if TYPE_CHECKING:
    from anarchobot.config.schema import Config

SETTINGS = {
    "--method": "generation.method",
    "--temperature": "generation.temperature",
    "--top-k": "generation.top_k",
    "--top-p": "generation.top_p",
    "--min-p": "generation.min_p",
    "--repetition-penalty": "generation.repetition_penalty",
    "--max-new-tokens": "generation.max_new_tokens",
    "--seed": "generation.seed",
}


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "generate", _generate, "write text with a trained model")
    add_model(parser)
    add_settings(parser, {"--prompt": "generation.prompt", **SETTINGS})
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help='prompts to go on from, one a line; .jsonl: rows {"prompt": ...}'
    )


def add_model(parser: Parser) -> None:
    """--checkpoint, and --stop as often as wanted."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run folder, one of its step_… folders, or a Hugging Face model's folder",
    )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="generation.stop: end before this text; may be repeated"
    )


def settings_for(args: argparse.Namespace, trained: "Config") -> "Config":
    """The sections that are about use: as the model was trained with them, and the flags over that."""
    from anarchobot.config.loading import load_config

    sections = {name: getattr(trained, name).model_dump() for name in ("generation", "knowledge_base")}
    base = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    if args.stop is not None:
        base["generation.stop"] = args.stop
    return load_config(None, overrides(args, base)).config


def _generate(args: argparse.Namespace) -> None:
    prompts = None if args.prompts is None else _read(args.prompts)
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.inference.generation import generate, generate_each
    from anarchobot.inference.model import load_model

    model, trained = load_model(args.checkpoint)
    settings = settings_for(args, trained).generation
    if prompts is not None:
        for prompt, text in zip(prompts, generate_each(model, prompts, settings), strict=True):
            _write(_row(prompt, text) if args.json else f"{prompt}{text}\n\n")
        return
    if args.json:
        _write(_row(settings.prompt, generate(model, settings)))
        return
    unsaid = [settings.prompt]  # written with the first piece: a prompt that is too long is an error, not an echo

    def write(text: str) -> None:
        _write("".join([*unsaid, text]))
        unsaid.clear()

    generate(model, settings, on_text=write)
    write("")
    _write("\n")


def _read(file: Path) -> list[str]:
    """The prompts in a file: its lines, but for empty ones."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8: expected text, or JSONL (.jsonl)") from error
    numbered = [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"{file}: no prompts in it: expected one a line")
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_prompt(line, f"{file}:{number}") for number, line in numbered]


def _prompt(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise UserError(f'{where}: expected {{"prompt": "..."}}')
    return str(row["prompt"])


def _row(prompt: str, text: str) -> str:
    return json.dumps({"prompt": prompt, "text": text}) + "\n"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
