"""`anarchobot kb add | search | list | remove | feedback`."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from anarchobot.cli.parser import add_command, add_settings, overrides
from anarchobot.config.errors import UserError

if TYPE_CHECKING:
    from anarchobot.knowledge.knowledge_base import KnowledgeBase

PATH = {"--kb": "knowledge_base.path"}
ALPHA = {"--feedback-alpha": "knowledge_base.feedback_alpha"}
SEARCH_SETTINGS = PATH | ALPHA | {"-k": "knowledge_base.retrieval_k"}


def add_commands(commands: Any) -> None:
    kb = commands.add_parser("kb", help="a knowledge base: files of yours to look answers up in")
    parts = kb.add_subparsers(metavar="add|search|list|remove|feedback", required=True, parser_class=type(kb))

    add = add_command(parts, "add", _add, "put files in, or put them in again when they have changed")
    add.add_argument("files", nargs="+", metavar="FILE", help="text, JSONL or Parquet files, folders or globs")
    add_settings(add, PATH | {"--text-field": "data.text_field"})

    search = add_command(parts, "search", _search, "the passages that answer a question best")
    search.add_argument("question", metavar="QUESTION")
    add_settings(search, SEARCH_SETTINGS)

    add_settings(add_command(parts, "list", _list, "the documents in it"), PATH)

    remove = add_command(parts, "remove", _remove, "take documents out")
    remove.add_argument("names", nargs="+", metavar="NAME", help="as kb list shows it")
    add_settings(remove, PATH)

    feedback = add_command(parts, "feedback", _feedback, "say that a passage helped with a question, or did not")
    feedback.add_argument("--question", required=True, metavar="QUESTION", help="the question that was asked")
    feedback.add_argument(
        "--passage", required=True, nargs="+", type=int, metavar="ID", help="the passage's number in kb search"
    )
    vote = feedback.add_mutually_exclusive_group(required=True)
    vote.add_argument("--good", action="store_true", help="it helped")
    vote.add_argument("--bad", action="store_true", help="it did not")
    add_settings(feedback, PATH | ALPHA)


def _open(args: argparse.Namespace, create: bool = False) -> "KnowledgeBase":
    from anarchobot.config.loading import load_config
    from anarchobot.knowledge.knowledge_base import KnowledgeBase

    settings = load_config(None, overrides(args)).config.knowledge_base
    if settings.path is None:
        raise UserError(f"which knowledge base? Give --kb FILE (see {args.prog} --help)")
    return KnowledgeBase(settings.path, settings, create)


def _add(args: argparse.Namespace) -> None:
    from anarchobot.config.loading import load_config
    from anarchobot.data.sources import files
    from anarchobot.knowledge.adding import add_files

    data = load_config(None, overrides(args)).config.data
    paths = files.find(args.files)  # a slip in a name is told before a base is made
    is_silent = args.quiet or args.json
    with _open(args, create=True) as base:
        done = add_files(base, paths, args.files, data, say=lambda line: None if is_silent else print(line))
        passages = sum(held.passages for held in base.documents())
    if args.json:
        outcomes = {name: getattr(done, name) for name in ("added", "replaced", "equal", "failed")}
        print(json.dumps(outcomes | {"texts": done.counts.as_manifest(), "passages": passages}))
    elif not args.quiet:
        print(
            f"files: {len(done.added)} added, {len(done.replaced)} replaced, {len(done.equal)} unchanged, "
            f"{len(done.failed)} failed; the base has {passages:,} passages"
        )
        for line in done.counts.details():
            print(f"  {line}")
    if done.failed:
        more = f" ({len(done.failed) - 1} more files failed)" if len(done.failed) > 1 else ""
        raise UserError(f"{done.failed[0]}{more}")


def _search(args: argparse.Namespace) -> None:
    with _open(args) as base:
        hits = base.search(args.question)
    if args.json:
        print(json.dumps({"question": args.question, "hits": [hit._asdict() for hit in hits]}))
        return
    for i, hit in enumerate(hits, start=1):
        print(f"[{i}] {_shown(hit.source)}  passage {hit.passage_id}, score {hit.score:.3f}")
        print(f"{_shown(hit.text.strip())}\n")
    if not hits and not args.quiet:
        print("nothing found: no passage has a word of the question")


def _list(args: argparse.Namespace) -> None:
    with _open(args) as base:
        documents = base.documents()
    if args.json:
        print(json.dumps({"documents": [held._asdict() for held in documents]}))
        return
    for held in documents:
        votes = f", {held.votes:,} votes" if held.votes else ""
        print(f"{_shown(held.name)}: {held.passages:,} passages{votes}")
    if not args.quiet:
        print(f"{len(documents):,} documents, {sum(held.passages for held in documents):,} passages")


def _remove(args: argparse.Namespace) -> None:
    removed = {}
    with _open(args) as base:
        for name in args.names:
            removed[name] = base.remove(name)
            if not (args.json or args.quiet):
                print(f"{_shown(name)}: {removed[name]:,} passages removed")
    if args.json:
        print(json.dumps({"removed": removed}))


def _feedback(args: argparse.Namespace) -> None:
    with _open(args) as base:
        base.feedback(args.question, args.passage, 1.0 if args.good else -1.0)
        relevances = base.relevances(args.question, args.passage)
    if args.json:
        print(json.dumps({"relevance": relevances}))
    elif not args.quiet:
        for passage, relevance in relevances.items():
            print(f"passage {passage}: relevance {relevance:+.3f} to this question (from -1 to 1)")


def _shown(text: str) -> str:
    """A text from a file, for a terminal: its escape codes are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
