"""`anarchobot tokenizer train`, `pretokenize` and `shards`: text to token shards."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command, add_config, add_settings, overrides, positive
from anarchobot.config.errors import UserError

if TYPE_CHECKING:
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

SHOWN_DOCUMENTS, SHOWN_CHARS = 3, 200  # by shards info; a character is at most 4 tokens


def add_commands(commands: Any) -> None:
    tokenizer = commands.add_parser("tokenizer", help="make a tokenizer")
    parts = tokenizer.add_subparsers(metavar="train", required=True, parser_class=type(tokenizer))
    train = add_command(parts, "train", _train_tokenizer, "learn a tokenizer from text")
    add_config(train, optional=True)
    train.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="text, JSONL or Parquet files, folders or globs; default: data.dataset",
    )
    train.add_argument("--output", metavar="PREFIX", help="writes PREFIX.model; default: train.tokenizer_path")
    add_settings(train, TOKENIZER_SETTINGS)

    pretokenize = add_command(commands, "pretokenize", _pretokenize, "turn text into token shards")
    add_config(pretokenize, optional=True)
    pretokenize.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="text, JSONL or Parquet files, folders or globs; default: data.dataset",
    )
    pretokenize.add_argument("--restart", action="store_true", help="start anew; replaces the shards that are there")
    apart = pretokenize.add_argument_group("in parts, which are joined to the same shards")
    apart.add_argument("--processes", type=positive, metavar="N", help="N programs on this machine, then join")
    apart.add_argument("--part", type=_part, metavar="K/N", help="only part K of N, from 0: one on each machine")
    apart.add_argument("--join", type=positive, metavar="N", help="join N parts that are made")
    add_settings(pretokenize, PRETOKENIZE_SETTINGS)

    shards = commands.add_parser("shards", help="look at token shards, or check them")
    parts = shards.add_subparsers(metavar="info|verify", required=True, parser_class=type(shards))
    for name, run, summary in (
        ("info", _info, "what is in the shards of a folder"),
        ("verify", _verify, "re-read every shard and compare it with the manifest"),
    ):
        add_command(parts, name, run, summary).add_argument("dir", metavar="DIR")


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)


def _train_tokenizer(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config
    from anarchobot.data.sources.documents import DocumentCounts
    from anarchobot.tasks.pretokenize import read
    from anarchobot.tokenizers.training import limit_bytes, train_tokenizer

    config = load_config(args.config, overrides(args)).config
    output = args.output or config.train.tokenizer_path
    if output is None:
        raise UserError("where to? Give --output PREFIX, or set train.tokenizer_path")
    prefix = Path(output)  # or the file that is loaded later, as train.tokenizer_path names it
    prefix = prefix.with_name(prefix.name.removesuffix(".model").removesuffix("-vocab.json"))
    counts, taken = DocumentCounts(), [0]
    texts = (document.text for document in read(config, args.input, counts, _warn)[1])
    try:
        files = train_tokenizer(
            limit_bytes(texts, config.tokenizer.max_train_mb, taken),
            prefix,
            config.model.vocab_size,
            config.tokenizer.model_type,
            config.tokenizer.format,
        )
    except UserError as error:
        raise UserError(f"{error}; {counts.summary()}" if counts.broken or counts.filtered else str(error)) from error
    result = {"files": [str(f) for f in files], "vocab_size": config.model.vocab_size, "bytes": taken[0]}
    if args.json:
        print(json.dumps(result))
    elif not args.quiet:
        print(f"{files[0]}: {config.model.vocab_size} tokens, learned from {taken[0] / 1e6:.1f} MB of text")
        if counts.broken or counts.filtered:
            print(counts.summary(), file=sys.stderr)


def _pretokenize(args: argparse.Namespace) -> int | None:
    from anarchobot.config.loading import load_config
    from anarchobot.tasks.pretokenize import in_processes, is_made, join_parts, make_part, make_shards, open_corpus

    notes: list[str] = []
    silent = args.quiet or args.json

    def say(line: str) -> None:
        if line.startswith("WARNING") or (sys.stderr.isatty() and not silent):
            print(line, file=sys.stderr)
        else:
            notes.append(line)

    if args.join and (args.processes or args.part):
        raise UserError("--join beside --processes or --part: expected one of them (--processes joins its own parts)")
    corpus = open_corpus(load_config(args.config, overrides(args)), args.input, say, _warn, args.part)
    folder = str(corpus.folder)
    if args.part:
        part, parts = args.part
        made = make_part(corpus, part, parts)
        if args.json:
            print(json.dumps({"part": part, "parts": parts, "made": made}))
        elif not args.quiet:
            print(f"{folder}: part {part}/{parts} is {'made' if made else 'there already'}")
        return None
    if args.processes and (args.restart or not is_made(corpus)):
        say(f"tokenising in {args.processes} processes")
        one_thread = [sys.executable, "-P", "-m", "anarchobot", *args.words, "--workers", "1"]
        if failed := in_processes(one_thread, args.processes):
            return failed
    with _byte_progress(silent, _size_of(corpus.names)) as progress:
        if parts := args.join or args.processes:
            manifest = join_parts(corpus, parts, restart=args.restart, progress=progress, say=say)
        else:
            manifest = make_shards(corpus, restart=args.restart, progress=progress, say=say)
    if not manifest.of("train"):
        _warn(f"{folder}: all text fell to validation: give more, or set data.val_fraction: 0")
    if args.json:
        print(manifest.to_json(), end="")
    elif not args.quiet:
        _print_summary(folder, manifest)
        for line in (*notes, *corpus.counts.details()):
            print(f"  {line}")
    return None


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected K/N with K from 0 to N - 1, such as 0/16")
    return int(part), int(parts)


def _size_of(names: list[str]) -> int | None:
    """Bytes of the files, for the progress bar; None when they are packed, or no files."""
    from anarchobot.data.sources import files, hub

    if any(name == "builtin" or hub.is_hub_name(name) for name in names):
        return None
    paths = files.find(names)
    packed = any(path.suffix in (".gz", ".zst", ".parquet") for path in paths)
    return None if packed else sum(path.stat().st_size for path in paths)


@contextmanager
def _byte_progress(quiet: bool, total: int | None) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        done = [0, 0]

        def progress(size: int, tokens: int) -> None:
            done[0] += size
            done[1] += tokens
            seconds = bar.tasks[0].elapsed or 1e-9
            rate = done[0] / seconds / 1e6
            said = f"{done[0] / 1e6:,.0f} MB, {done[1] / 1e6:,.1f} M tokens, {rate:,.1f} MB/s"
            bar.update(task, completed=done[0], description=said)

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
    from anarchobot.data.shards import TokenStream, first_documents, length_histogram
    from anarchobot.tokenizers.tokenizer import load_tokenizer

    stream = TokenStream(args.dir, "train")
    histogram = length_histogram(args.dir)
    if args.json:
        bins = [{"from": n, "to": 2 * n - 1, "documents": documents} for n, documents in histogram]
        print(json.dumps(json.loads(stream.manifest.to_json()) | {"histogram": bins}, indent=1))
        return
    _print_summary(args.dir, stream.manifest)
    print("  lengths of documents, in tokens:")
    widest = max(documents for _, documents in histogram)
    for n, documents in histogram:
        bar = "#" * -(-40 * documents // widest)
        print(f"  {n:>12,} to {2 * n - 1:<12,} {documents:>12,} {bar}".rstrip())
    tokenizer = load_tokenizer(Path(args.dir) / stream.manifest.tokenizer["file"])
    for number, ids in enumerate(first_documents(stream, SHOWN_DOCUMENTS, 4 * SHOWN_CHARS), start=1):
        print(f"  document {number}: {tokenizer.decode(ids.tolist())[:SHOWN_CHARS]!r}")


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
        raise UserError(f"{args.dir}: {len(bad)} of {len(results)} files are damaged: pretokenize again")
    return 0
