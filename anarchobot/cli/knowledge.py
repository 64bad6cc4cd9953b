"""`anarchobot kb add | embed | search | list | remove | feedback`."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import REQUIRED, Parser, add_command, add_group, add_settings, overrides
from anarchobot.config.errors import UserError
from anarchobot.config.wording import count

if TYPE_CHECKING:
    from anarchobot.config.schema import KnowledgeBaseConfig
    from anarchobot.inference.text_encoder import TextEncoder
    from anarchobot.knowledge.knowledge_base import KnowledgeBase

PATH = {"--kb": "knowledge_base.path"}
ALPHA = {"--feedback-alpha": "knowledge_base.feedback_alpha"}
MODEL = {"--embedding-model": "knowledge_base.embedding_model"}
RANKING = ALPHA | MODEL | {"-k": "knowledge_base.retrieval_k"}
SEARCH_SETTINGS = PATH | RANKING


def add_commands(commands: Any) -> None:
    kb = add_group(commands, "kb", "add|embed|search|list|remove|feedback", "manage a knowledge base of your files")

    add = add_command(kb, "add", _add, "add files, or update files that have changed")
    add.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="text, JSONL, Parquet, PDF, DOCX, EPUB, HTML or PPTX files, folders or globs",
    )
    _add_settings(add, MODEL | {"--text-field": "data.text_field"})

    embed = add_command(kb, "embed", _embed, "embed the passages that have no embedding yet")
    embed.add_argument("--rebuild", action="store_true", help="remove the existing embeddings first (default: off)")
    _add_settings(embed, MODEL)

    search = add_command(kb, "search", _search, "find the passages that best match a question")
    search.add_argument("question", metavar="QUESTION", help="text to search for")
    _add_settings(search, RANKING)

    _add_settings(add_command(kb, "list", _list, "list the documents"))

    remove = add_command(kb, "remove", _remove, "remove documents")
    remove.add_argument("names", nargs="+", metavar="NAME", help="document name as shown by kb list")
    _add_settings(remove)

    feedback = add_command(kb, "feedback", _feedback, "record whether passages helped with a question")
    feedback.add_argument("--question", required=True, metavar="QUESTION", help="the question that was asked")
    feedback.add_argument(
        "--passage", required=True, nargs="+", type=int, metavar="ID", help="passage IDs as shown by kb search"
    )
    vote = feedback.add_mutually_exclusive_group(required=True)
    vote.add_argument("--good", action="store_true", help="the passages helped")
    vote.add_argument("--bad", action="store_true", help="the passages did not help")
    _add_settings(feedback, ALPHA)


def _add_settings(parser: Parser, settings: dict[str, str] | None = None) -> None:
    """Adds --kb and flags for `settings`."""
    add_settings(parser, PATH, REQUIRED)
    add_settings(parser, settings or {})


def open_knowledge_base(
    settings: "KnowledgeBaseConfig", create: bool = False, rebuild: bool = False
) -> "KnowledgeBase":
    """Opens `settings.path` with its embedding model, if there is one."""
    from anarchobot.knowledge.knowledge_base import KnowledgeBase

    assert settings.path is not None
    encoder = None if settings.embedding_model is None else load_encoder(settings.embedding_model)
    return KnowledgeBase(settings.path, settings, create, encoder, rebuild)


def load_encoder(name: str) -> "TextEncoder":
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.inference.text_encoder import TextEncoder

    return TextEncoder(name)


def warn_of_missing_embeddings(base: "KnowledgeBase") -> None:
    if missing := base.without_embedding():
        advice = "embed them with: anarchobot kb embed"
        print(f"warning: {count(missing, 'passage')} found by keyword only: {advice}", file=sys.stderr)


def _open(args: argparse.Namespace, create: bool = False, rebuild: bool = False) -> "KnowledgeBase":
    from anarchobot.config.loading import load_config

    settings = load_config(None, overrides(args)).config.knowledge_base
    if settings.path is None:
        raise UserError(f"missing --kb FILE (see {args.prog} --help)")
    return open_knowledge_base(settings, create, rebuild)


def _embed_passages(base: "KnowledgeBase", quiet: bool) -> int:
    """Returns the number of passages that were embedded."""
    from rich.console import Console
    from rich.progress import Progress

    if not (missing := base.without_embedding()):
        return 0
    console = Console(file=sys.stderr)
    embedded = 0
    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("embedding", total=missing)
        for number in base.embed():
            embedded += number
            bar.update(task, advance=number)
    return embedded


def _embed(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config

    if load_config(None, overrides(args)).config.knowledge_base.embedding_model is None:
        raise UserError(f"missing --embedding-model MODEL (see {args.prog} --help)")
    with _open(args, rebuild=args.rebuild) as base:
        embedded = _embed_passages(base, args.quiet)
        passages = sum(document.passages for document in base.documents())
    if args.json:
        print(json.dumps({"embedded": embedded, "passages": passages}))
    else:
        print(f"{count(embedded, 'passage')} embedded; {count(passages, 'passage')} in total")


def _add(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config
    from anarchobot.data.sources import files
    from anarchobot.knowledge.knowledge_base import add_files

    data = load_config(None, overrides(args)).config.data
    unread: list[files.Unread] = []
    paths = files.find(args.files, unread)  # first, so that a mistyped name does not create an empty knowledge base
    silent = args.quiet or args.json
    with _open(args, create=True) as base:
        result = add_files(base, paths, args.files, data, log=lambda line: None if silent else print(line))
        embedded = _embed_passages(base, silent)
        passages = sum(document.passages for document in base.documents())
    if args.json:
        outcomes = {name: getattr(result, name) for name in ("added", "replaced", "equal", "failed")}
        counts = {"texts": result.counts.as_manifest(), "passages": passages, "embedded": embedded}
        print(json.dumps(outcomes | counts))
    else:
        print(
            f"files: {len(result.added)} added, {len(result.replaced)} replaced, {len(result.equal)} unchanged, "
            f"{len(result.failed)} failed; {count(passages, 'passage')} in total"
            + (f", {embedded:,} embedded" if embedded else "")
        )
        for line in (*result.counts.details(), *files.describe_unread(unread)):
            print(f"  {line}")
    if result.failed:
        more = f" ({count(len(result.failed) - 1, 'more file')} failed)" if len(result.failed) > 1 else ""
        raise UserError(f"{result.failed[0]}{more}")


def _search(args: argparse.Namespace) -> None:
    with _open(args) as base:
        warn_of_missing_embeddings(base)
        hits = base.search(args.question)
    if args.json:
        print(json.dumps({"question": args.question, "hits": [hit._asdict() for hit in hits]}))
        return
    for i, hit in enumerate(hits, start=1):
        print(f"[{i}] {hit.source}  passage {hit.passage_id}, score {hit.score:.3f}")
        print(f"{hit.text.strip()}\n")
    if not hits:
        print("no passage matches any word of the question")


def _list(args: argparse.Namespace) -> None:
    with _open(args) as base:
        documents = base.documents()
    if args.json:
        print(json.dumps({"documents": [document._asdict() for document in documents]}))
        return
    for document in documents:
        votes = f", {count(document.votes, 'vote')}" if document.votes else ""
        print(f"{document.name}: {count(document.passages, 'passage')}{votes}")
    passages = sum(document.passages for document in documents)
    print(f"{count(len(documents), 'document')}, {count(passages, 'passage')}")


def _remove(args: argparse.Namespace) -> None:
    removed = {}
    with _open(args) as base:
        for name in args.names:
            removed[name] = base.remove(name)
            if not args.json:
                print(f"{name}: {count(removed[name], 'passage')} removed")
    if args.json:
        print(json.dumps({"removed": removed}))


def _feedback(args: argparse.Namespace) -> None:
    with _open(args) as base:
        base.feedback(args.question, args.passage, 1.0 if args.good else -1.0)
        relevances = base.relevances(args.question, args.passage)
    if args.json:
        print(json.dumps({"relevance": relevances}))
    else:
        for passage, relevance in relevances.items():
            print(f"passage {passage}: relevance to this question {relevance:+.3f} (from -1 to 1)")
