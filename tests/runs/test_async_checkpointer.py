"""When a checkpoint is due."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anarchobot.config.schema import TrainConfig
from anarchobot.runs import async_checkpointer, checkpoint
from anarchobot.runs.async_checkpointer import RETRY_SECONDS, AsyncCheckpointer


def test_a_failed_save_is_due_again_after_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    now = 100.0
    monkeypatch.setattr(async_checkpointer, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(checkpoint, "save", fail)
    results: list[async_checkpointer.SaveResult] = []
    train = TrainConfig(ckpt_interval=1000, ckpt_minutes=None)
    with AsyncCheckpointer(tmp_path, train, 0, results.append) as saver:
        saver.save(1, {}, {})
        saver.wait()
        due = []
        for seconds in (0, RETRY_SECONDS - 1, RETRY_SECONDS, RETRY_SECONDS + 1):
            now = 100.0 + seconds
            due.append(saver.is_due(2))
    assert due == [False, False, True, True]
    assert [(result.step, result.written, str(result.error)) for result in results] == [(1, False, "disk full")]
