"""`anarchobot tokenizer train`, `pretokenize` and `shards`: text to token shards."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command, add_config, add_settings, overrides
from anarchobot.config.errors import UserError

if TYPE_CHECKING:
    from anarchobot.config.schema import Config
    from anarchobot.data.documents import Counts, Document
    from anarchobot.data.shards import Manifest

TOKENIZER_SETTINGS = {
    "--vocab-size": "model.vocab_size",
    "--model-type": "tokenizer.model_type",
    "--format": "tokenizer.format",
}
PRETOKENIZE_SETTINGS = {
    "--tokenizer": "train.tokenizer_path",
    "--output": "data.shard_dir",
    "--text-field": "data.text_field",
    "--val-fraction": "data.val_fraction",
    "--workers": "data.num_workers",
}


def add_commands(commands: Any) -> None:
    tokenizer = commands.add_parser("tokenizer", help="make a tokenizer")
    parts = tokenizer.add_subparsers(metavar="train", required=True, parser_class=type(tokenizer))
    train = add_command(parts, "train", _train_tokenizer, "learn a tokenizer from text")
    add_config(train, optional=True)
    train.add_argument("--input", nargs="+", metavar="FILE", help="text or JSONL files; default: data.dataset")
    train.add_argument("--output", metavar="PREFIX", help="writes PREFIX.model; default: train.tokenizer_path")
    add_settings(train, TOKENIZER_SETTINGS)

    pretokenize = add_command(commands, "pretokenize", _pretokenize, "turn text into token shards")
    add_config(pretokenize, optional=True)
    pretokenize.add_argument("--input", nargs="+", metavar="FILE", help="text or JSONL files; default: data.dataset")
    add_settings(pretokenize, PRETOKENIZE_SETTINGS)

    shards = commands.add_parser("shards", help="look at token shards, or check them")
    parts = shards.add_subparsers(metavar="info|verify", required=True, parser_class=type(shards))
    for name, run, summary in (
        ("info", _info, "what is in the shards of a folder"),
        ("verify", _verify, "re-read every shard and compare it with the manifest"),
    ):
        add_command(parts, name, run, summary).add_argument("dir", metavar="DIR")


def _documents(args: argparse.Namespace, config: "Config", counts: "Counts") -> "Iterator[Document]":
    from anarchobot.data.documents import from_files, open_source

    if args.input:
        return from_files(args.input, config.data, counts)
    name, documents = open_source(config.data, config.train.seed, counts)
    if name == "builtin" and config.data.dataset != "builtin":
        print(
            f"WARNING: the dataset {config.data.dataset} can't be reached: going on with the built-in text instead "
            "(data.fallback: builtin)",
            file=sys.stderr,
        )
    return documents


def _train_tokenizer(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config
    from anarchobot.data.documents import Counts
    from anarchobot.data.tokenizer_training import limited, train_tokenizer

    config = load_config(args.config, overrides(args)).config
    output = args.output or config.train.tokenizer_path
    if output is None:
        raise UserError("where to? Give --output PREFIX, or set train.tokenizer_path")
    prefix = Path(output)
    if not args.output:  # train.tokenizer_path names the file that is loaded later
        prefix = prefix.with_name(prefix.name.removesuffix(".model").removesuffix("-vocab.json"))
    counts, taken = Counts(), [0]
    texts = (document.text for document in _documents(args, config, counts))
    files = train_tokenizer(
        limited(texts, config.tokenizer.max_train_mb, taken),
        prefix,
        config.model.vocab_size,
        config.tokenizer.model_type,
        config.tokenizer.format,
    )
    result = {"files": [str(f) for f in files], "vocab_size": config.model.vocab_size, "bytes": taken[0]}
    if args.json:
        print(json.dumps(result))
    elif not args.quiet:
        print(f"{files[0]}: {config.model.vocab_size} tokens, learned from {taken[0] / 1e6:.1f} MB of text")


def _pretokenize(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config
    from anarchobot.data.documents import Counts
    from anarchobot.data.pretokenize import pretokenize
    from anarchobot.data.tokenizer import load_tokenizer

    loaded = load_config(args.config, overrides(args))
    config = loaded.config
    if config.train.tokenizer_path is None:
        raise UserError("which tokenizer? Give --tokenizer FILE, or set train.tokenizer_path")
    tokenizer = load_tokenizer(config.train.tokenizer_path)
    if "model.vocab_size" in loaded.sources and tokenizer.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{loaded.where('model.vocab_size')}: {config.model.vocab_size}, but {config.train.tokenizer_path} has "
            f"{tokenizer.vocab_size} tokens: set model.vocab_size: {tokenizer.vocab_size}"
        )
    counts = Counts()
    documents = _documents(args, config, counts)
    with _byte_progress(args.quiet or args.json) as progress:
        manifest = pretokenize(
            documents,
            tokenizer,
            config.data.shard_dir,
            counts=counts,
            val_fraction=config.data.val_fraction,
            num_workers=config.data.num_workers,
            seed=config.train.seed,
            progress=progress,
        )
    if args.json:
        print(manifest.to_json(), end="")
    elif not args.quiet:
        _print_summary(config.data.shard_dir, manifest)
        if counts.first_broken:
            print(f"  first broken: {counts.first_broken}")


@contextmanager
def _byte_progress(quiet: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    console = Console(file=sys.stderr)
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        done = [0, 0]

        def progress(size: int, tokens: int) -> None:
            done[0] += size
            done[1] += tokens
            seconds = bar.tasks[0].elapsed or 1e-9
            rate = done[0] / seconds / 1e6
            bar.update(task, description=f"{done[0] / 1e6:,.0f} MB, {done[1] / 1e6:,.1f} M tokens, {rate:,.1f} MB/s")

        yield progress


def _print_summary(folder: str, manifest: "Manifest") -> None:
    from anarchobot.data.shards import SPLITS

    print(f"{folder}: {manifest.tokenizer['name']}, {manifest.vocab_size} tokens, {manifest.dtype}")
    for split in SPLITS:
        shards = manifest.of(split)
        size = sum(s.bytes for s in shards)
        print(
            f"  {split}: {sum(s.tokens for s in shards):,} tokens of {sum(s.documents for s in shards):,} documents, "
            f"{size / 1e6:,.2f} MB of text, {len(shards)} shard(s)"
        )
    print("  documents: " + ", ".join(f"{name} {number:,}" for name, number in manifest.counts.items()))


def _info(args: argparse.Namespace) -> None:
    from anarchobot.data.shards import TokenStream, read_manifest
    from anarchobot.data.tokenizer import load_tokenizer

    manifest = read_manifest(args.dir)
    if args.json:
        print(manifest.to_json(), end="")
        return
    _print_summary(args.dir, manifest)
    stream = TokenStream(args.dir, "train")
    start = stream.read(0, min(64, stream.tokens)).tolist()
    tokenizer = load_tokenizer(Path(args.dir) / manifest.tokenizer["file"])
    print(f"  begins: {tokenizer.decode(start)!r}")


def _verify(args: argparse.Namespace) -> int:
    from anarchobot.data.shards import verify

    results = list(verify(args.dir))
    bad = [(name, problem) for name, problem in results if problem]
    if args.json:
        print(json.dumps({"checked": len(results), "damaged": dict(bad)}))
    else:
        for name, problem in results:
            print(f"{name}: {problem or 'good'}")
    if bad:
        raise UserError(f"{args.dir}: {len(bad)} of {len(results)} shards are damaged: pretokenize again")
    return 0
