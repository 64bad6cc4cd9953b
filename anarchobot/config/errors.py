"""Errors that the user can fix: one line and no traceback."""

import difflib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_LENGTH = 2000  # characters of a message
REPORTS_ENV = "ANARCHOBOT_REPORTS"  # environment variable: a folder that the ranks of `launch` on a machine share


class UserError(Exception):
    """A usage or configuration error.

    The message is one line: what is wrong, where (file, line, key), what was expected, how to fix it.
    The command line prints it and exits with `exit_code`; `--debug` also shows the traceback.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        text, half = one_line(message), MAX_LENGTH // 2
        super().__init__(text if len(text) <= MAX_LENGTH else f"{text[: half - 1]}…{text[-half:]}")


def one_line(message: str) -> str:
    """Escapes line breaks and control codes: messages quote user input and names of files."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)


def first_to_report(message: str) -> bool:
    """Returns False if another rank on this machine has reported the same error."""
    folder = os.environ.get(REPORTS_ENV)
    if folder is None:
        return True
    try:
        Path(folder, hashlib.sha256(message.encode(errors="replace")).hexdigest()).touch(exist_ok=False)
    except OSError as error:
        return not isinstance(error, FileExistsError)
    return True


def first_problem(error: "ValidationError") -> str:
    """Describes the first value that pydantic refused: "shards.0.split: Field required"."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` for the closest match of `name`, or an empty string if there is none."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean '{matches[0]}'?" if matches else ""
