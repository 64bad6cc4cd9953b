"""wandb, Trackio and MLflow: the real packages where they are installed, without a network; failures with a fake."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.runs import trackers
from anarchobot.runs.metrics_log import MetricsLog
from anarchobot.runs.run_log import read_run
from anarchobot.runs.trackers import open_trackers

ROOT = Path(__file__).parents[2]
# Settings of the three packages that keep everything in the current folder. The file store is MLflow's quickest.
OFFLINE = {
    "WANDB_MODE": "offline", "TRACKIO_DIR": "trackio", "MLFLOW_TRACKING_URI": "./mlruns",
    "MLFLOW_ALLOW_FILE_STORE": "true", "HOME": ".",
}  # fmt: skip
# What they store besides losses and samples; the end of the run that failed and of its continuation, which finished.
STORED: dict[str, dict[str, Any]] = {
    "wandb": {"names": ["mine"]},
    "trackio": {"config": {"d_model": 64}},
    "mlflow": {"names": ["mine"], "params": {"model.d_model": "64"}},
}
ENDS = {"wandb": (1, 0), "mlflow": ("FAILED", "FINISHED")}


@pytest.mark.parametrize("name", STORED)
def test_a_resumed_run_continues_the_run_of_its_tracker(name: str, tmp_path: Path) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.runs.tracker_child", name],
        cwd=tmp_path, env=os.environ | OFFLINE | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, last, ids = json.loads(done.stdout)  # nothing else is printed
    for stored, steps, end in ((first, (1, 2, 3, 4), 0), (last, (1, 2, 3, 4, 4, 5, 6), 1)):
        expected = STORED[name] | ({"ends": [ENDS[name][end]]} if name in ENDS else {})
        losses = [[step, pytest.approx(1 / step)] for step in steps]
        assert stored == expected | {"losses": losses, "samples": 1 + end, "ids": [ids[name]]}


class Fake:
    """Fails in the calls numbered in `failing`; waits for `gate` before each."""

    place = "memory"

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.calls: list[Any] = []
        self._failing, self._count = failing, 0
        self.done: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.gate = threading.Event()
        self.gate.set()
        self.id = "none"

    def __call__(self, logs: Path, name: str, config: Mapping[str, Any], run_id: str | None) -> "Fake":
        self.id = run_id or "new"
        self.calls.append((name, config["model"]["d_model"], run_id))
        return self

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call(step, dict(values))

    def log_text(self, step: int, name: str, text: str) -> None:
        self._call(step, name, text)

    def close(self, end: str) -> None:
        self._call(end)

    def _call(self, *args: Any) -> None:
        self.gate.wait(20)
        self._count += 1
        self.done.put(self._count)
        if self._count in self._failing:
            raise ConnectionError("no\nroute")
        self.calls.append(args)


def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Fake) -> tuple[MetricsLog, list[str]]:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", fake)
    threads, messages = open_trackers(["tensorboard", "wandb", "wandb"], tmp_path, "mine", {"model": {"d_model": 8}})
    assert messages == ["logging to wandb (memory)"]
    warnings: list[str] = []
    return MetricsLog(tmp_path, trackers=threads, warn=warnings.append), warnings


def test_what_a_tracker_receives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that the next start continues the same run."""
    for run_id, finished, end in ((None, False, "stopped"), ("new", True, "finished")):
        log, warnings = start(tmp_path, monkeypatch, fake := Fake())
        with log:
            log.event("train", 25, loss=2.5)
            log.event("save", 25, folder="step_00000025")
            log.event("sample", 25, text="Once")
            log.event("end", 25, finished=finished)
        assert fake.calls == [("mine", 8, run_id), (25, {"train/loss": 2.5}), (25, "sample", "Once"), (end,)]
        assert warnings == []


def test_a_failing_tracker_is_reported_once_and_its_losses_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, warnings = start(tmp_path, monkeypatch, fake := Fake(failing=(2, 3)))
    with pytest.raises(KeyError), log:  # the run fails as well
        for step in range(1, 6):
            log.event("train", step, loss=1.0)
            fake.done.get(timeout=20)
        raise KeyError
    assert [call[0] for call in fake.calls[1:]] == [1, 4, 5, "failed"]
    first, last = warnings
    assert "wandb" in first and "ConnectionError" in first and "\n" not in first
    assert "wandb" in last and "lost 2 events" in last
    (tmp_path / "logs").mkdir()
    (tmp_path / "metrics.jsonl").rename(tmp_path / "logs" / "metrics.jsonl")
    run = read_run(tmp_path)
    assert [event["text"] for event in run.events_of("warning")] == [first]
    assert [step for step, _ in run.points("train", "loss")] == [1, 2, 3, 4, 5]


def test_a_tracker_that_hangs_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.0)
    log, warnings = start(tmp_path, monkeypatch, fake := Fake())
    fake.gate.clear()
    with log:
        log.event("train", 1, loss=1.0)
        log.event("train", 2, loss=1.0)
    fake.gate.set()
    assert len(warnings) == 1 and "lost 3 events" in warnings[0]  # its end is one of them


def test_a_new_run_needs_its_trackers_and_a_continued_one_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", broken)
    with pytest.raises(UserError, match=r"train\.log_to: wandb .*no route"):
        open_trackers(["wandb"], tmp_path, "mine", {})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Fake())
    open_trackers(["wandb"], tmp_path, "mine", {"model": {"d_model": 8}})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", broken)
    threads, (message,) = open_trackers(["wandb"], tmp_path, "mine", {})
    assert threads == [] and message.startswith("warning: ") and "no route" in message


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_a_missing_package_is_named_with_its_installation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        open_trackers([name], tmp_path, "mine", {})
