"""`anarchobot export` and `anarchobot import`."""

import argparse
import json
import sys
from typing import Any

from anarchobot.cli.parser import add_command
from anarchobot.config.errors import UserError


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "export", _export, "write a trained model for transformers, mlx-lm or llama.cpp")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a run folder, or one of its step_… folders"
    )
    parser.add_argument(
        "--to", required=True, metavar="hf|mlx|gguf", help="hf: transformers; mlx: mlx-lm; gguf: llama.cpp and Ollama"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="the folder to write; it must be new or empty")
    parser.add_argument(
        "--dtype",
        metavar="float32|float16|bfloat16",
        default="float32",
        help="of the weights; float32, the default, is what was trained, the others are half as large",
    )
    parser = add_command(commands, "import", _import, "bring a Hugging Face model in, to use it or train it further")
    parser.add_argument("folder", metavar="DIR", help="a folder with config.json, safetensors files and a tokenizer")
    parser.add_argument("--output", required=True, metavar="PATH", help="the run folder to write; new or empty")


def _export(args: argparse.Namespace) -> None:
    from anarchobot.exchange.exporting import export
    from anarchobot.exchange.targets import TARGETS
    from anarchobot.exchange.dtypes import DTYPES

    for flag, value, choices in (("--to", args.to, TARGETS), ("--dtype", args.dtype, DTYPES)):
        if value not in choices:
            raise UserError(f"argument {flag}: '{value}', expected one of {', '.join(choices)}")
    done = export(args.checkpoint, args.to, args.output, args.dtype)
    size = sum(done["files"].values())
    _tell(args, done, f"{done['output']}: {done['parameters']:,} parameters in {done['dtype']}, {size / 1e6:,.1f} MB")


def _import(args: argparse.Namespace) -> None:
    from anarchobot.exchange.importing import import_model

    done = import_model(args.folder, args.output)
    _tell(args, done, f"{done['output']}: {done['architecture']} of {done['parameters']:,} parameters")


def _tell(args: argparse.Namespace, done: dict[str, Any], line: str) -> None:
    if args.json:
        print(json.dumps(done))
        return
    for warning in done["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if not args.quiet:
        print(line)
