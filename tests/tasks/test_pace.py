"""A run whose steps are slower than planned: when it is reported, and what is said."""

import json
import time
from pathlib import Path

import pytest

from anarchobot.runs.run_log import RunLog
from anarchobot.tasks import pace
from anarchobot.tasks.pace import describe_delay, warn_if_late


def run_with(*speeds: float, steps: int = 1000, step: int = 400) -> RunLog:
    """At `step` of `steps`, of 100 tokens each; `speeds` are tokens per second of the last log lines."""
    at = range(step - 10 * (len(speeds) - 1), step + 1, 10)
    events = [
        {"event": "train", "step": i, "tokens": 100 * i, "tokens_per_second": speed}
        for i, speed in zip(at, speeds, strict=True)
    ]
    return RunLog(Path("run"), {}, events, {"steps": steps}, 0, "running")


def test_delay_is_that_of_the_steps_left_at_the_median_speed() -> None:
    """600 steps are left. They were to take 0.5 s each, 300 s in all; at 100 tokens per second they take 600."""
    slow = run_with(500.0, *[100.0] * 5)
    assert describe_delay(slow, 0.5, 299.0, True) == (
        "steps take 2.0 times as long as planned: 10:00 left, so that the run ends about 5:00 late"
    )
    assert describe_delay(slow, 0.5, 301.0, True) is None
    assert (
        describe_delay(slow, 0.5, 299.0, False)
        == "steps take 2.0 times as long as planned: the run will have fewer steps"
    )
    paused = run_with(*[200.0] * 3, 1.0, 1.0)
    assert describe_delay(paused, 0.5, 1.0, True) is None
    assert describe_delay(run_with(*[100.0] * 4), 0.5, 1.0, True) is None  # too early to say
    assert describe_delay(run_with(*[100.0] * 5, steps=400), 0.5, 0.0, True) is None  # done


def test_a_late_run_is_reported_once_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "CHECK_SECONDS", 0.01)
    said: list[str] = []
    with warn_if_late(tmp_path, 0.5, 299.0, True, said.append):
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "environment.json").write_text(json.dumps({"steps": 1000}))
        lines = [json.dumps(event | {"time": 1.0}) + "\n" for event in run_with(*[100.0] * 5).events]
        (tmp_path / "logs" / "metrics.jsonl").write_text("".join(lines))
        while not said:
            time.sleep(0.01)
    assert len(said) == 1 and said[0].startswith("warning: steps take 2.0 times")
