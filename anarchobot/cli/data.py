"""`anarchobot tokenizer train`, `pretokenize` and `shards`: from text to token shards."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import Parser, add_command, add_config, add_group, add_settings, overrides, positive
from anarchobot.config.errors import UserError
from anarchobot.config.paths import find_path
from anarchobot.config.wording import count

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

SAMPLE_DOCUMENTS, SAMPLE_CHARS = 3, 200  # shown by shards info; a character is at most 4 tokens


def add_commands(commands: Any) -> None:
    tokenizer = add_group(commands, "tokenizer", "train", "train a tokenizer")
    train = add_command(tokenizer, "train", _train_tokenizer, "train a tokenizer on text")
    add_config(train, optional=True)
    _add_input(train)
    train.add_argument(
        "--output",
        metavar="PREFIX",
        help="write PREFIX.model and PREFIX.vocab, or for gpt2 PREFIX-vocab.json and PREFIX-merges.txt "
        "(default: train.tokenizer_path)",
    )
    add_settings(train, TOKENIZER_SETTINGS)

    pretokenize = add_command(commands, "pretokenize", _pretokenize, "convert text to token shards")
    add_config(pretokenize, optional=True)
    _add_input(pretokenize)
    pretokenize.add_argument("--restart", action="store_true", help="start over, replacing existing shards")
    parallel = pretokenize.add_argument_group("parallel processing (output is identical for any N)")
    parallel.add_argument(
        "--processes", type=positive, metavar="N", help="tokenize N parts in N processes and join them (default: none)"
    )
    parallel.add_argument(
        "--part", type=_part, metavar="K/N", help="tokenize only part K of N, counted from 0 (default: all text)"
    )
    parallel.add_argument("--join", type=positive, metavar="N", help="join N finished parts (default: none)")
    add_settings(pretokenize, PRETOKENIZE_SETTINGS)

    shards = add_group(commands, "shards", "info|verify", "inspect or verify token shards")
    for name, run, summary in (
        ("info", _info, "show statistics and sample documents of token shards"),
        ("verify", _verify, "compare every shard with the checksums in the manifest"),
    ):
        add_command(shards, name, run, summary).add_argument("dir", metavar="DIR", help="folder of the shards")


def _add_input(parser: Parser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="text, JSONL, Parquet, PDF, DOCX, EPUB, HTML or PPTX files, folders or globs (default: data.dataset)",
    )


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"expected K/N with 0 <= K < N, such as 0/16, got {text!r}")
    return int(part), int(parts)


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)


def _train_tokenizer(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config
    from anarchobot.data.sources.documents import DocumentCounts
    from anarchobot.tasks.pretokenize import open_documents
    from anarchobot.tokenizers.training import limit_bytes, train_tokenizer

    config = load_config(args.config, overrides(args)).config
    output = args.output or config.train.tokenizer_path
    if output is None:
        raise UserError("missing --output PREFIX (or set train.tokenizer_path)")
    prefix = Path(output)  # train.tokenizer_path names the file itself
    prefix = prefix.with_name(prefix.name.removesuffix(".model").removesuffix("-vocab.json"))
    counts, bytes_read = DocumentCounts(), [0]
    texts = (document.text for document in open_documents(config, args.input, counts, _warn)[1])
    try:
        files = train_tokenizer(
            limit_bytes(texts, config.tokenizer.max_train_mb, bytes_read),
            prefix,
            config.model.vocab_size,
            config.tokenizer.model_type,
            config.tokenizer.format,
        )
    except UserError as error:
        raise UserError(f"{error}; {counts.summary()}" if counts.broken or counts.filtered else str(error)) from error
    result = {"files": [str(f) for f in files], "vocab_size": config.model.vocab_size, "bytes": bytes_read[0]}
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{files[0]}: {config.model.vocab_size} tokens, trained on {bytes_read[0] / 1e6:.1f} MB of text")
        if counts.details():
            print(counts.summary(), file=sys.stderr)


def _pretokenize(args: argparse.Namespace) -> int | None:
    from anarchobot.config.loading import load_config
    from anarchobot.data.sources.documents import total_bytes
    from anarchobot.tasks.pretokenize import open_corpus, run_part_processes

    notes: list[str] = []
    silent = args.quiet or args.json

    def log(line: str) -> None:
        if line.startswith("WARNING") or (sys.stderr.isatty() and not silent):
            print(line, file=sys.stderr)
        else:
            notes.append(line)

    if args.join and (args.processes or args.part):
        raise UserError("argument --join: not allowed with --processes (which joins its parts) or --part")
    corpus = open_corpus(load_config(args.config, overrides(args)), args.input, log, _warn, args.part)
    folder = str(corpus.job.folder)
    if args.part:
        part, parts = args.part
        is_new = corpus.write_part(part, parts)
        if args.json:
            print(json.dumps({"part": part, "parts": parts, "made": is_new}))
        else:
            print(f"{folder}: part {part}/{parts} {'finished' if is_new else 'already finished'}")
        return None
    if args.processes and (args.restart or not corpus.is_done()):
        log(f"tokenizing in {args.processes} processes")
        command = [sys.executable, "-P", "-m", "anarchobot", *args.argv, "--workers", "1"]
        if failed := run_part_processes(command, args.processes):
            return failed
    with _byte_progress(silent, total_bytes(corpus.names)) as progress:
        if parts := args.join or args.processes:
            manifest = corpus.join(parts, restart=args.restart, progress=progress, log=log)
        else:
            manifest = corpus.pretokenize(restart=args.restart, progress=progress, log=log)
    if not manifest.shards_in("train"):
        _warn(f"{folder}: all documents are in the validation split; add more text or set data.val_fraction to 0")
    if args.json:
        print(manifest.to_json(), end="")
    else:
        _print_manifest(folder, manifest)
        for line in (*notes, *corpus.job.counts.details()):
            print(f"  {line}")
    return None


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
            description = f"{done[0] / 1e6:,.0f} MB, {done[1] / 1e6:,.1f} M tokens, {rate:,.1f} MB/s"
            bar.update(task, completed=done[0], description=description)

        yield progress


def _print_manifest(folder: str, manifest: "Manifest") -> None:
    from anarchobot.data.shards import SPLITS

    print(f"{folder}: {manifest.tokenizer['name']}, vocabulary of {manifest.vocab_size}, {manifest.dtype}")
    for split in SPLITS:
        shards = manifest.shards_in(split)
        size = sum(s.bytes for s in shards)
        print(
            f"  {split}: {count(sum(s.tokens for s in shards), 'token')}, "
            f"{count(sum(s.documents for s in shards), 'document')}, "
            f"{size / 1e6:,.2f} MB of text, {count(len(shards), 'shard')}"
        )
    print("  documents: " + ", ".join(f"{name} {number:,}" for name, number in manifest.counts.items()))
    documents = sum(s.documents for s in manifest.shards)
    if split_documents := documents - manifest.counts.get("kept", documents):  # absent if another program wrote it
        print(f"  in both splits: {count(split_documents, 'document')}, whose end is held out")


def _info(args: argparse.Namespace) -> None:
    from anarchobot.data.shards import TokenStream, first_documents, length_histogram
    from anarchobot.tokenizers.tokenizer import load_tokenizer

    stream = TokenStream(args.dir, "train")
    histogram = length_histogram(args.dir)
    if args.json:
        bins = [{"from": n, "to": 2 * n - 1, "documents": documents} for n, documents in histogram]
        print(json.dumps(json.loads(stream.manifest.to_json()) | {"histogram": bins}, indent=1))
        return
    _print_manifest(args.dir, stream.manifest)
    print("  document lengths in tokens:")
    widest = max(documents for _, documents in histogram)
    for n, documents in histogram:
        bar = "#" * -(-40 * documents // widest)
        print(f"  {n:>12,} to {2 * n - 1:<12,} {documents:>12,} {bar}".rstrip())
    tokenizer = load_tokenizer(find_path(str(Path(args.dir, stream.manifest.tokenizer["file"]))))
    for number, ids in enumerate(first_documents(stream, SAMPLE_DOCUMENTS, 4 * SAMPLE_CHARS), start=1):
        print(f"  document {number}: {tokenizer.decode(ids.tolist())[:SAMPLE_CHARS]!r}")


def _verify(args: argparse.Namespace) -> int:
    from anarchobot.data.shards import verify

    results = list(verify(args.dir))
    bad = {name: problem for name, problem in results if problem}
    if args.json:
        print(json.dumps({"checked": len(results), "damaged": bad}))
    else:
        for name, problem in results:
            print(f"{name}: {problem or 'ok'}")
    if bad:
        raise UserError(f"{args.dir}: {len(bad)} of {count(len(results), 'file')} corrupt; run pretokenize again")
    return 0
