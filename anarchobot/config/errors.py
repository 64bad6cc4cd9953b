"""Errors that the user can fix: one line and no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A usage or configuration error.

    The message is one line: what is wrong, where (file, line, key), what was expected, how to fix it.
    The command line prints it and exits with `exit_code`; `--debug` also shows the traceback.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """Escapes line breaks and control codes: messages quote user input and names of files."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest match of `name`, or an empty string if there is none."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
