"""The `anarchobot` program: its commands, exit codes and error messages."""

import io
import os
import sys
import traceback

from anarchobot import __version__
from anarchobot.cli import (
    completion,
    config,
    data,
    inference,
    knowledge,
    models,
    monitor,
    preflight,
    runs,
    train,
    training,
)
from anarchobot.cli.parser import Parser, parse
from anarchobot.config.errors import UserError, first_to_report, one_line
from anarchobot.config.terminal import visible_output
from anarchobot.exchange import hub
from anarchobot.system.gpu_watchdog import as_gpu_timeout, relax_watchdog


def build_parser() -> Parser:
    parser = Parser(
        prog="anarchobot",
        description="Train, fine-tune and run your own language models.",
        epilog="Exit codes: 0 success, 1 internal or GPU error, 2 usage or configuration error, 130 stopped by Ctrl-C.",
    )
    parser.add_argument("--version", action="version", version=f"anarchobot {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for module in (train, config, data, preflight, training, inference, knowledge, models, monitor, runs, completion):
        module.add_commands(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    relax_watchdog()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the output can't encode are escaped
            stream.reconfigure(errors="backslashreplace")
    with visible_output():
        return _run(argv, debug)


def _run(argv: list[str], debug: bool) -> int:
    try:
        parser = build_parser()
        completion.complete(parser)
        if not argv:
            parser.print_help(sys.stderr)
            return 2
        args = parse(parser, argv)
        args.argv, args.parser = argv, parser  # for commands that run other commands
        hub.show_progress = not args.quiet
        code = args.run(args) or 0
        sys.stdout.flush()  # here, so that a closed pipe is handled below
        return int(code)
    except UserError as error:
        return _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _fail("stopped", 130, debug)
    except BrokenPipeError:  # the reader closed the pipe; discard buffered output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail("out of memory; reduce the model size, train.micro_batch_size or data.seq_len", 1, debug)
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 2, debug)
    except Exception as error:
        if timeout := as_gpu_timeout(error):
            return _fail(str(timeout), timeout.exit_code, debug)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return _fail(f"internal error: {what} (--debug shows the traceback)", 1, debug)


def _fail(message: str, code: int, debug: bool) -> int:
    if not first_to_report(message):
        return code
    if debug:
        traceback.print_exc()
    line = f"anarchobot: {one_line(message)}\n"
    print(line, end="", file=sys.stderr, flush=True)  # one write: ranks may print at once
    return code
