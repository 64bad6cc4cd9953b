"""Completion in a shell: what the program answers, and the scripts that ask it."""

import os
import subprocess
import sys

import pytest

from anarchobot.cli.completion import SHELLS
from anarchobot.cli.main import main

ANSWER = "import os, sys; os.dup2(1, 8); sys.argv[0] = 'anarchobot'; from anarchobot.cli.main import main; main()"


def complete(line: str) -> set[str]:
    """What argcomplete's script for bash gets for a command line with the cursor at its end."""
    variables = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash", "COMP_TYPE": "9"}
    environment = os.environ | variables | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER], env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return {word.strip() for word in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("anarchobot pre", {"pretokenize", "pretrain"}),
        ("anarchobot config s", {"show", "schema"}),
        ("anarchobot generate --top", {"--top-k", "--top-p"}),
    ],
)
def test_commands_and_flags_are_completed(line: str, words: set[str]) -> None:
    assert complete(line) == words


def test_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        assert "anarchobot" in capsys.readouterr().out
    assert main(["completion", "zs"]) == 2
    assert capsys.readouterr().err == "anarchobot: unknown shell 'zs'; did you mean 'zsh'?\n"
