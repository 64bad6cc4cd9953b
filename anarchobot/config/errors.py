"""The mistakes of people, and how they are told: one line, no traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the person at the keyboard can mend.

    The message is one line: what is wrong, where (file, line, key), what was expected, how to mend it.
    The command line prints it and exits with 2; `--debug` shows the traceback as well.
    """

    def __init__(self, message: str) -> None:
        # What people wrote is quoted in it: a line break or a terminal's escape code is shown, not obeyed.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the candidate nearest to `name`, or nothing when none is near."""
    nearest = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean '{nearest[0]}'?" if nearest else ""
