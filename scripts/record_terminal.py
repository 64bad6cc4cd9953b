"""Records a command in a terminal as a picture: docs/terminal.svg.

pip install pyte
python scripts/record_terminal.py docs/terminal.svg -- anarchobot train notes --time 2m

The picture shows the last lines of the terminal when the command ends, with colors, below the command.
"""

import io
import os
import pty
import shlex
import sys
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 100, 400


def record(command: list[str]) -> list[Text]:
    """Runs the command in a terminal of COLUMNS columns; returns its lines."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
        os.execvp(command[0], command)  # noqa: S606
    while True:
        try:
            data = os.read(terminal, 2**16)
        except OSError:  # Linux: the command has ended
            data = b""
        if not data:
            break
        stream.feed(data)
    if code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"exit code {code}")
    lines = [_line(screen.buffer[i]) for i in range(LINES)]
    while lines and not lines[-1].plain.strip():
        lines.pop()
    return lines


def _line(cells: dict[int, pyte.screens.Char]) -> Text:
    line = Text()
    for column in range(COLUMNS):
        cell = cells[column]
        color = "" if cell.fg == "default" else cell.fg if cell.fg.isalpha() else f"#{cell.fg}"
        line.append(cell.data, " ".join(filter(None, ["bold" if cell.bold else "", color.replace("brown", "yellow")])))
    line.rstrip()
    return line


def main() -> None:
    output, separator, *command = sys.argv[1:]
    assert separator == "--"
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ {shlex.join(command)}", "bold"))
    for line in record(command):
        console.print(line, overflow="crop", no_wrap=True)
    Path(output).write_text(console.export_svg(title="anarchobot"), encoding="utf-8")


if __name__ == "__main__":
    main()
