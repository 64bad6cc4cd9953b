"""Whether something fits on a disk: checkpoints and exports, with a disk of simulated size."""

import errno
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from anarchobot.cli.main import main
from anarchobot.config.schema import TrainConfig
from anarchobot.runs import checkpoint
from anarchobot.runs.async_checkpointer import AsyncCheckpointer, SaveResult
from anarchobot.storage import free_space
from anarchobot.storage.free_space import RESERVE, require_space
from tests.exchange.random_run import make_run


def set_free(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 10**12) -> None:
    usage = SimpleNamespace(total=total, free=free)
    monkeypatch.setattr(free_space, "shutil", SimpleNamespace(disk_usage=lambda path: path.stat() and usage))
    monkeypatch.setattr(free_space, "sys", SimpleNamespace(platform="linux"))


def test_require_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 3_000_000 + RESERVE)
    require_space(tmp_path / "not" / "there", 3_000_000)
    with pytest.raises(OSError, match=r"4\.0 MB needed, but 4\.0 MB free") as raised:
        require_space(tmp_path, 3_000_001)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path)
    set_free(monkeypatch, 0, total=0)  # a file system that does not say
    require_space(tmp_path, 3_000_001)
    set_free(monkeypatch, 0)
    monkeypatch.setattr(free_space, "sys", SimpleNamespace(platform="darwin"))
    require_space(tmp_path, 3_000_001)


def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[SaveResult] = []
    arrays = {"params/a": np.arange(2**18, dtype=np.float32)}
    with AsyncCheckpointer(tmp_path, TrainConfig(ckpt_keep=1), 0, results.append) as saver:
        for step, free in ((1, RESERVE + 2**20), (2, RESERVE + 2**20 - 1), (3, RESERVE + 2**20)):
            set_free(monkeypatch, free)
            saver.save(step, arrays, {"config": {}})
            saver.wait()
            assert [path.name for path in tmp_path.glob(".*")] == []
            assert saver.newest == (1 if step == 2 else step)
            assert checkpoint.find(tmp_path).step == saver.newest
    assert [(result.step, result.written) for result in results] == [(1, True), (2, False), (3, True)]
    assert "2.1 MB needed, but 2.1 MB free" in str(results[1].error)


def test_an_export_and_an_import_that_do_not_fit_write_nothing(
    tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", next(tiny_shards.glob("*.model")), n_layers=1)
    words = ["export", "--checkpoint", str(run), "--to", "hf", "--output", str(tmp_path / "out")]
    set_free(monkeypatch, RESERVE)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"anarchobot: {tmp_path / 'out'}: ") and "free some space" in error
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "tiny0") == ["run"]
    set_free(monkeypatch, 10**9)
    assert main(words) == 0
    set_free(monkeypatch, RESERVE)
    capsys.readouterr()
    assert main(["import", str(tmp_path / "out"), "--output", str(tmp_path / "again")]) == 2
    assert "free some space" in capsys.readouterr().err and not (tmp_path / "again").exists()
