"""`anarchobot serve`."""

import argparse
import json
from pathlib import Path
from typing import Any

from anarchobot.cli.parser import add_command, count, positive
from anarchobot.config.errors import UserError


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "serve", _serve, "answer over HTTP, as OpenAI's servers do, with a page to chat in")
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run folder, one of its step_… folders, or a Hugging Face model's folder",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=_port, default=8080, help="8080; 0: any that is free")
    parser.add_argument(
        "--max-tokens", type=positive, default=2048, metavar="N", help="the most tokens of an answer: 2048"
    )
    parser.add_argument("--queue", type=count, default=64, metavar="N", help="requests that may wait: 64")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="holds the key that clients must send; left out: ANARCHOBOT_API_KEY, or no key",
    )
    parser.add_argument(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="other names that it answers to (of the Host header)",
    )
    parser.add_argument(
        "--allow-origin", nargs="+", default=[], metavar="ORIGIN", help="other sites whose pages may ask it"
    )
    parser.add_argument("--model-name", metavar="NAME", help="what clients call the model; left out: its folder's name")


def _serve(args: argparse.Namespace) -> None:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    try:
        from anarchobot.serving.app import Limits
        from anarchobot.serving.gate import allowed_hosts, allowed_origins, read_key
        from anarchobot.serving.server import Options, listen, serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise UserError("serve needs starlette and uvicorn: pip install 'anarchobot[serve]'") from error
    from anarchobot.inference.model import load_model

    options = Options(
        name=args.model_name or Path(args.checkpoint).resolve().name,
        host=args.host,
        port=args.port,
        key=read_key(args.api_key_file),
        hosts=allowed_hosts(args.host, args.allow_host),
        origins=allowed_origins(args.allow_origin),
        waiting=args.queue,
        limits=Limits(tokens=args.max_tokens),
    )

    def on_start(address: str) -> None:
        if args.json:
            print(json.dumps({"url": address, "model": options.name}), flush=True)
        elif not args.quiet:
            print(f"{options.name}: {address} (Ctrl-C stops it)", flush=True)

    with listen(options) as bound:  # before the model is loaded: a mistake is told at once
        model, trained = load_model(args.checkpoint)
        serve(model, trained.generation, options, bound, on_start)


def _port(word: str) -> int:
    if (number := count(word)) > 65535:
        raise argparse.ArgumentTypeError(f"'{word}': expected a port, 0 to 65535")
    return number
