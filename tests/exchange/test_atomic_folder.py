"""Folders that are complete or absent."""

import os
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.exchange.atomic_folder import atomic_folder
from tests.storage.disk_calls import DiskCalls


def test_everything_is_on_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = DiskCalls(monkeypatch, tmp_path)
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "step").mkdir()
        (folder / "step" / "a").write_text("a")
        (folder / "b").write_text("b")
        assert not (tmp_path / "out").exists()
    *before, rename, last = calls.in_order()
    assert sorted(before) == ["fsync out", "fsync out/b", "fsync out/step", "fsync out/step/a"]
    assert rename == f"rename {folder.name} out" and last == "fsync ."


def test_leftover_of_a_killed_process_with_the_same_id(tmp_path: Path) -> None:
    (tmp_path / f".out.{os.getpid()}.tmp").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / "out" / "a").read_text() == "a"
    assert (tmp_path / "out").stat().st_mode == (tmp_path / f".out.{os.getpid()}.tmp").stat().st_mode


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("a")
    with pytest.raises(UserError, match="already exists and is not empty"), atomic_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
