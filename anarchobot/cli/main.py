"""The program: which command, and what its mistakes look like."""

import os
import sys
import traceback

from anarchobot import __version__
from anarchobot.cli import (
    adapting,
    chatting,
    configs,
    corpus,
    evaluating,
    exchanging,
    fusing,
    generating,
    knowledge,
    launching,
    measuring,
    planning,
    reporting,
    selftesting,
    serving,
    training,
    tuning,
    verifying,
)
from anarchobot.cli.parser import Parser, parse
from anarchobot.config.errors import UserError


def build_parser() -> Parser:
    parser = Parser(
        prog="anarchobot",
        description="Make a language model of your own.",
        epilog="Exit codes: 0 done, 2 a mistake of yours, 130 stopped by Ctrl-C, 1 anything else.",
    )
    parser.add_argument("--version", action="version", version=f"anarchobot {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for room in (
        corpus,
        training,
        tuning,
        launching,
        adapting,
        generating,
        chatting,
        serving,
        knowledge,
        evaluating,
        exchanging,
        fusing,
        measuring,
        planning,
        reporting,
        verifying,
        selftesting,
        configs,
    ):
        room.add_commands(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code (also the console script's)."""
    words = sys.argv[1:] if argv is None else argv
    debug = "--debug" in words
    try:
        args = parse(build_parser(), words)
        args.words = words  # for a command that starts itself again
        code = args.run(args) or 0
        sys.stdout.flush()  # here, where a reader that has gone is still caught
        return int(code)
    except UserError as error:
        return _fail(str(error), 2, debug)
    except KeyboardInterrupt:
        return _fail("stopped", 130, debug)
    except BrokenPipeError:  # the reader of our output has gone: what is left of it goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail("out of memory: make the model, train.micro_batch_size or data.seq_len smaller", 1, debug)
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 2, debug)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"unexpected {what} (a fault of the program's; --debug shows where)", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"anarchobot: {message}", file=sys.stderr)
    return code
