"""The variable that relaxes macOS's GPU watchdog, and the message of the program."""

import os
import sys

import pytest

from anarchobot.cli import main as program
from anarchobot.system.gpu_watchdog import VARIABLE


@pytest.mark.parametrize(
    ("platform", "before", "after"), [("darwin", None, "1"), ("darwin", "0", "0"), ("linux", None, None)]
)
def test_the_program_sets_the_variable_on_macos_only(
    platform: str, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any command runs; a user's own value stays."""
    monkeypatch.setenv(VARIABLE, "")  # restores the absence of the variable after the test
    monkeypatch.delenv(VARIABLE)
    if before is not None:
        monkeypatch.setenv(VARIABLE, before)
    monkeypatch.setattr(sys, "platform", platform)
    assert program.main(["no-such-command"]) == 2
    assert os.environ.get(VARIABLE) == after


def test_a_command_that_the_watchdog_stops_exits_with_1_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing could be retried, as in generation."""

    def stopped() -> None:
        raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:k...).")

    monkeypatch.setattr(program, "build_parser", stopped)
    assert program.main([]) == 1
    said = capsys.readouterr().err
    assert said.startswith("anarchobot: macOS stopped the GPU's work") and said.count("\n") == 1
