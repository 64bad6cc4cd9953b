"""`anarchobot generate`."""

import argparse
import json
import sys
from typing import Any

from anarchobot.cli.parser import add_command, add_settings, overrides

SETTINGS = {
    "--prompt": "generation.prompt",
    "--method": "generation.method",
    "--temperature": "generation.temperature",
    "--top-k": "generation.top_k",
    "--top-p": "generation.top_p",
    "--repetition-penalty": "generation.repetition_penalty",
    "--max-new-tokens": "generation.max_new_tokens",
    "--seed": "generation.seed",
}


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "generate", _generate, "write text with a trained model")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a run folder, or one of its step_… folders"
    )
    add_settings(parser, SETTINGS)


def _generate(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.inference.generation import generate, load_model

    model, trained = load_model(args.checkpoint)
    base = {f"generation.{key}": value for key, value in trained.generation.model_dump().items()}
    settings = load_config(None, overrides(args, base)).config.generation
    if args.json:
        print(json.dumps({"prompt": settings.prompt, "text": generate(model, settings)}))
        return
    unsaid = [settings.prompt]  # written with the first piece: a prompt that is too long is an error, not an echo

    def write(text: str) -> None:
        _write("".join([*unsaid, text]))
        unsaid.clear()

    generate(model, settings, on_text=write)
    write("")
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
