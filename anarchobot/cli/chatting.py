"""`anarchobot chat`."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anarchobot.cli.generating import SETTINGS, add_model, settings_for
from anarchobot.cli.knowledge import SEARCH_SETTINGS
from anarchobot.cli.parser import add_command, add_settings
from anarchobot.config.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from anarchobot.inference.chat import ChatSession

HELP = """\
/reset        forget what was said
/system TEXT  tell the model this before everything else; without TEXT, nothing
/save FILE    add the conversation to a JSONL file, which `anarchobot sft` learns from
/good, /bad   what the knowledge base found for the last question helped, or did not
/help         these lines
Ctrl-C stops an answer, Ctrl-D ends the chat."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_commands(commands: Any) -> None:
    parser = add_command(commands, "chat", _chat, "talk with a model")
    add_model(parser)
    add_settings(parser, SETTINGS | SEARCH_SETTINGS)


def _chat(args: argparse.Namespace) -> None:
    from anarchobot.system.blas import load_fast_blas

    load_fast_blas()  # before MLX is imported
    from anarchobot.inference.chat import ChatSession
    from anarchobot.inference.model import load_model
    from anarchobot.knowledge.knowledge_base import KnowledgeBase

    model, trained = load_model(args.checkpoint)
    config = settings_for(args, trained)
    settings = config.knowledge_base
    with ExitStack() as stack:
        base = None if settings.path is None else stack.enter_context(KnowledgeBase(settings.path, settings))
        session = ChatSession(model, config.generation, base)
        for warning in session.warnings():
            print(f"warning: {warning}", file=sys.stderr)
        _talk(session, args)


def _talk(session: "ChatSession", args: argparse.Namespace) -> None:
    """Line by line, from a person or a pipe. A mistake is told, and the conversation goes on."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  makes input() a line editor with a history
        if not args.quiet:
            print("/help lists the commands", file=sys.stderr)
    while (line := _line(is_terminal)) is not None:
        try:
            if line.startswith("/"):
                _obey(session, line, say=lambda text: None if args.quiet else print(text, file=sys.stderr))
            elif line:
                _answer(session, line, args)
        except (UserError, OSError) as error:
            told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            print(f"anarchobot: {told}", file=sys.stderr)
        except KeyboardInterrupt:
            with suppress(KeyboardInterrupt):
                print(flush=True)
    if is_terminal:
        print()


def _line(is_terminal: bool) -> str | None:
    """The next line, or None at the end."""
    while True:
        try:
            return input("> " if is_terminal else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            with suppress(KeyboardInterrupt):  # one that comes now means the same
                print("\nCtrl-D ends the chat", file=sys.stderr)


def _answer(session: "ChatSession", question: str, args: argparse.Namespace) -> None:
    forgotten = session.forgotten
    text = session.answer(question, on_text=(lambda text: None) if args.json else _write)
    sources = list(dict.fromkeys(hit.source for hit in session.hits))
    if args.json:
        _write(json.dumps({"question": question, "answer": text, "sources": sources}) + "\n")
        return
    _write("\n")
    if not text and not args.quiet:
        print("(the model said nothing)", file=sys.stderr)
    if sources and not args.quiet:
        _write(f"(from {', '.join(sources)})\n")
    if session.forgotten > forgotten and not args.quiet:
        print(f"({session.forgotten} turns no longer fit into the model's context window)", file=sys.stderr)


def _obey(session: "ChatSession", line: str, say: Callable[[str], None]) -> None:
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        session.reset()
        say("forgotten")
    elif command == "/system":
        session.set_system(rest)
        say("told" if rest else "told nothing")
    elif command == "/save":
        if not rest:
            raise UserError("/save: which FILE?")
        session.save(Path(rest))
        say(f"{rest}: added")
    elif command in ("/good", "/bad"):
        votes = session.vote(1.0 if command == "/good" else -1.0)
        say(f"noted for {votes} passages")
    else:
        near = did_you_mean(command, re.findall(r"/\w+", HELP))
        raise UserError(f"'{command}': no such command{near} (/help lists them)")


def _write(text: str) -> None:
    """On a terminal, escape codes that a model or a file says are shown, not obeyed."""
    if sys.stdout.isatty():
        text = _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
    sys.stdout.write(text)
    sys.stdout.flush()
