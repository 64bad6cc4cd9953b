"""Control characters in text from models, files and the network: printed as visible escapes, such as `\\x1b`.

A terminal interprets control characters. Printed text could otherwise set the window title, move the cursor, overwrite
what is on the screen, or fill the clipboard.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

# C0 except newline and tab, DEL, C1, and the bidirectional embeddings, overrides and isolates, which reorder a line.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Escapes each control character except newline and tab. Joined pieces give the same as the whole text."""
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


@contextmanager
def visible_output() -> Iterator[None]:
    """A context manager in which everything written to `sys.stdout` and `sys.stderr` is `visible`.

    Exceptions are `write_text` and rich, which writes its own control codes to the original stream.
    """
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = cast(TextIO, _VisibleStream(stdout)), cast(TextIO, _VisibleStream(stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = stdout, stderr


def write_text(text: str) -> None:
    """Writes text to stdout: unchanged to a pipe or file, `visible` to a terminal."""
    sys.stdout.write(text) if sys.stdout.isatty() else getattr(sys.stdout, _ORIGINAL, sys.stdout).write(text)
    sys.stdout.flush()


_ORIGINAL = "rich_proxied_file"  # rich writes to the stream in this attribute


class _VisibleStream:
    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        # Progress bars of other packages start each write with a carriage return.
        start = "\r" if text.startswith("\r") and self is sys.stderr else ""
        self.rich_proxied_file.write(start + visible(text.removeprefix(start)))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)
