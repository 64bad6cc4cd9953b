"""Reading a run: truncated lines, steps trained again after a resume, and the run's state."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.runs.run_log import find_runs, read_run
from anarchobot.storage.lock import FolderLock
from anarchobot.tasks.pretrain import pretrain
from tests.tiny import loaded


def write(folder: Path, *lines: dict[str, Any] | str) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("train:\n  total_steps: 9\n")
    text = [line if isinstance(line, str) else json.dumps({"time": 1.0, **line}) for line in lines]
    (folder / "logs" / "metrics.jsonl").write_text("\n".join(text) + "\n")
    return folder


def test_steps_trained_again_replace_the_old_ones(tmp_path: Path) -> None:
    run = read_run(write(
        tmp_path / "run",
        {"step": 1, "event": "train", "loss": 5.0}, {"step": 2, "event": "train", "loss": 4.0},
        {"step": 3, "event": "train", "loss": 9.0}, {"step": 3, "event": "eval", "val_loss": 1.0},
        '{"step": 4, "event": "tra',
        {"step": 2, "event": "resume", "folder": "step_00000002"},
        {"step": 3, "event": "train", "loss": 3.0}, {"step": 3, "event": "eval", "val_loss": 2.0},
    ))  # fmt: skip
    assert run.points("train", "loss") == [(1, 5.0), (2, 4.0), (3, 3.0)]
    assert (run.best("val_loss"), run.malformed, run.step, run.state) == ((3, 2.0), 1, 3, "died")


def test_read_and_find_real_runs(tmp_path: Path, tiny_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    summary = pretrain(loaded(tmp_path / "c.yaml", tiny_shards, runs / "a" / "first"), show="nothing")
    write(runs / "second", {"step": 1, "event": "end", "finished": False})
    (runs / "configs").mkdir()
    (runs / "configs" / "config.yaml").write_text("model: {}\n")  # a configuration without a run
    first, second = sorted(find_runs(runs), key=lambda run: run.name)
    assert (first.state, second.state) == ("finished", "stopped")
    assert first.last("train", "loss") == pytest.approx(summary["final_loss"])
    assert first.best("val_loss") == (pytest.approx(6), pytest.approx(summary["best_val_loss"]))
    assert first.step == summary["steps"] and first.config["model"]["d_model"] == 32
    assert first.environment["Python"] == sys.version.split()[0] and "float32" in first.environment["computes in"]
    with FolderLock(first.folder):
        assert read_run(first.folder).state == "running"
    with pytest.raises(UserError, match="no run here"):
        read_run(runs)
    with pytest.raises(UserError, match=r"no run here yet: anarchobot monitor \S+/configs --wait"):
        read_run(runs / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean 'runs/a/first'"):
        read_run("a/first")
    with pytest.raises(UserError, match="no such folder"):
        list(find_runs(runs / "none"))


def test_running_and_killed(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", {"step": 1, "event": "train", "loss": 5.0})
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom anarchobot.storage.lock import FolderLock\n"
        "with FolderLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        assert read_run(folder).state == "running"
        os.kill(process.pid, signal.SIGKILL)
    assert read_run(folder).state == "died"
