"""`anarchobot export`."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command, non_negative
from anarchobot.cli.results import log_to, note_chat_run, print_result
from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.paths import model_name_of

if TYPE_CHECKING:
    from anarchobot.exchange.dtypes import Dtype
    from anarchobot.exchange.exporting import HeldOut


def add_export(commands: Any) -> None:
    export = add_command(commands, "export", _export, "export a model to transformers, mlx-lm or llama.cpp")
    export.add_argument("--checkpoint", required=True, metavar="PATH", help="run folder or step_… folder")
    export.add_argument(
        "--to",
        required=True,
        metavar="hf|mlx|gguf|ollama|lmstudio",
        help="hf: transformers; mlx: mlx-lm; gguf: llama.cpp; ollama: a GGUF file and a Modelfile; lmstudio: a GGUF "
        "file named as in LM Studio's folder",
    )
    export.add_argument("--output", required=True, metavar="DIR", help="new or empty folder to write")
    export.add_argument(
        "--dtype",
        metavar="float32|float16|bfloat16",
        help="dtype of weights that are not quantized, and of scales (default: float32, or bfloat16 with --bits)",
    )
    export.add_argument(
        "--bits", type=non_negative, metavar="2-6|8", help="quantize for mlx-lm to this many bits (default: do not)"
    )
    export.add_argument(
        "--group-size", type=non_negative, metavar="32|64|128", help="weights that share a scale (default: 64)"
    )
    export.add_argument(
        "--mixed",
        type=non_negative,
        metavar="BITS",
        help="more bits for the output head and a third of the value and down projections, as in mlx-lm's recipes "
        "(default: none)",
    )
    export.add_argument(
        "--type",
        type=str.lower,
        metavar="TYPE",
        help="type of a GGUF file: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or, with llama-cpp-python, a K-quant "
        "such as q6_k, q5_k_m or q4_k_m (default: that of --dtype)",
    )
    export.add_argument(
        "--eval-text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="measure bits per byte before and after on text files (default: if quantized, on the run's validation "
        "shards)",
    )
    export.add_argument(
        "--push", metavar="ORG/NAME", help="upload the folder to the Hugging Face Hub, as a private model (default: no)"
    )
    export.set_defaults(instead={"--format": "did you mean '--to'?"})
    export.add_argument("--public", action="store_true", help="upload as a public model (default: private)")


def _export(args: argparse.Namespace) -> None:
    from anarchobot.exchange.dtypes import DTYPES
    from anarchobot.exchange.exporting import FORMATS, export
    from anarchobot.exchange.gguf_types import TYPES
    from anarchobot.exchange.mlx_quantization import MlxQuantization
    from anarchobot.exchange.upload import check_paths, check_repo, upload
    from anarchobot.model.quantization import BITS, GROUP_SIZES

    for flag, value, choices in (
        ("--to", args.to, tuple(FORMATS)),
        ("--dtype", args.dtype, DTYPES),
        ("--bits", args.bits, BITS),
        ("--group-size", args.group_size, GROUP_SIZES),
        ("--mixed", args.mixed, BITS),
        ("--type", args.type, TYPES),
    ):
        if value is not None and value not in choices:
            names = [str(choice) for choice in choices]
            near = did_you_mean(str(value), names)
            raise UserError(f"argument {flag}: expected one of {', '.join(names)}, got '{value}'{near}")
    _check_combination(args, FORMATS[args.to])
    note_chat_run(args)
    quantization = None if args.bits is None else MlxQuantization(args.bits, args.group_size or 64, args.mixed)
    if args.push is not None:
        check_repo(args.push)  # before the work
    dtype: Dtype = args.dtype or ("float32" if quantization is None else "bfloat16")
    held_out = _held_out(args)
    done = export(
        args.checkpoint, args.to, args.output, dtype, quantization=quantization, gguf_type=args.type, held_out=held_out
    )
    size = sum(done["files"].values())
    lines = [
        f"{done['output']}: {done['parameters']:,} parameters, {done['dtype']}, {done['bits_per_weight']:.2f} bits per "
        f"weight, {size / 1e6:,.1f} MB"
    ]
    if done["bits_per_byte"] is not None:
        text, before, after = done["bits_per_byte"].values()
        lines.append(f"bits per byte on {text}: {before:.4f} before, {after:.4f} after")
    if not args.json:  # before the upload, which may fail
        print_result(args, done, *lines)
    if args.push is not None:
        check_paths(Path(args.output))
        done["pushed"] = upload(Path(args.output), args.push, args.public)
    if args.to == "ollama" and not (args.json or args.quiet):
        name = shlex.quote(model_name_of(args.checkpoint))
        print(
            f"next: cd {shlex.quote(args.output)} && ollama create {name} -f Modelfile && ollama run {name}",
            file=sys.stderr,
        )
    if args.json:
        print_result(args, done)
    elif args.push is not None:
        print(f"uploaded to {done['pushed']} ({'public' if args.public else 'private'})")


def _check_combination(args: argparse.Namespace, target: str) -> None:
    """Raises UserError for flags that do not go together."""
    if args.bits is not None and target != "mlx":
        raise UserError("argument --bits: only with --to mlx; a GGUF file has --type")
    if args.type is not None and target != "gguf":
        raise UserError("argument --type: only with --to gguf, ollama or lmstudio; for mlx-lm there is --bits")
    if args.type is not None and args.dtype is not None:
        raise UserError("argument --dtype: not with --type, which says how all weights are stored: remove one")
    for flag, value in (("--group-size", args.group_size), ("--mixed", args.mixed)):
        if value is not None and args.bits is None:
            raise UserError(f"argument {flag}: only with --bits")
    if args.public and args.push is None:
        raise UserError("argument --public: only with --push")
    if args.mixed is not None and args.mixed <= args.bits:
        raise UserError(f"argument --mixed: expected more bits than --bits ({args.bits}), got {args.mixed}")


def _held_out(args: argparse.Namespace) -> "HeldOut | None":
    """The text to measure the loss on; by default, of quantized models only."""
    if not args.eval_text and args.bits is None and args.type in (None, "f32", "f16", "bf16"):
        return None
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.evaluation.held_out import held_out_shards, held_out_texts

    log = log_to(args.quiet or args.json)
    return held_out_texts(args.eval_text, log) if args.eval_text else held_out_shards(args.checkpoint, log)
