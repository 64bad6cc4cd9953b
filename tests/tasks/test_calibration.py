"""Measured times of a training step."""

from types import SimpleNamespace

import pytest

from anarchobot.config.schema import Config
from anarchobot.tasks import calibration


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([5.0, 0.02, *[0.03] * 60], (0.03, "measured")),  # the first step compiled its kernels
        ([5.0, 5.0], (5.0, "upper bound")),
        ([0.02, *[0.03] * 60], (0.03, "measured")),
    ],
)
def test_compilation_is_not_part_of_a_step(
    times: list[float], expected: tuple[float, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.model_validate({"train": {"micro_batch_size": 1, "grad_accum_steps": 1}})
    clock = [0.0]
    durations = iter(times)

    def train_step(*args: object) -> None:
        clock[0] += next(durations)

    engine = SimpleNamespace(engine=SimpleNamespace(train_step=train_step))
    monkeypatch.setattr(calibration, "open_engine", lambda *args: engine)
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds, method = calibration.step_seconds(config, None, 1, 1e15, 4.0)
    assert (seconds, method) == (pytest.approx(expected[0]), expected[1])
