"""Parts of `anarchobot selftest` that its own result does not show."""

import sys
from pathlib import Path

import pytest

from anarchobot.tasks import selftest


def test_no_operation_of_a_save_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers: list[int] = []

    def fail_operation(folder: Path, error: int, number: int, failures: list[str]) -> bool:
        numbers.append(number)
        return number < 4

    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "disk"), "28"])
    monkeypatch.setattr(selftest, "save_test_step", lambda *args: None)
    monkeypatch.setattr(selftest, "_fail_operation", fail_operation)
    selftest._failing_disk()
    assert numbers == [1, 2, 3, 4] and capsys.readouterr().out == "3\n"
