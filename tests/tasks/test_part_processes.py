"""The processes of `pretokenize --processes`."""

import sys

from anarchobot.tasks.pretokenize import run_part_processes


def test_each_is_in_a_session_of_its_own() -> None:
    """Otherwise a Ctrl-C would reach it twice: from the terminal, and forwarded."""
    code = "import os; raise SystemExit(3 if os.getsid(0) == os.getpid() else 4)"
    assert run_part_processes([sys.executable, "-c", code], 2) == 3
