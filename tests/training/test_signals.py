"""How a run handles signals."""

import os
import signal
from pathlib import Path

import pytest

from anarchobot.data.windows import Batch
from anarchobot.runs import checkpoint
from anarchobot.training import signals
from tests.training.fake_engine import FakeEngine, train


def test_skipped_validation_runs_on_resume(tmp_path: Path) -> None:
    """Stopped at step 4, where a validation was due: the resumed run starts with it. Likewise at the last step."""
    stopping = FakeEngine(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 4 else None)
    _, lines = train(tmp_path, stopping, 8, eval_interval=4)
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0]
    stopping = FakeEngine(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 8 else None)
    finished, lines = train(tmp_path, stopping, 8, start=4, eval_interval=4)
    assert not finished
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0, 4]
    finished, lines = train(tmp_path, FakeEngine(), 8, start=8, eval_interval=4)
    assert finished
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0, 4, 8]


def test_stop_request_interrupts_validation(tmp_path: Path) -> None:
    class Stopped(FakeEngine):
        def eval_step(self, batch: Batch) -> tuple[float, int]:
            if len([call for call in self.calls if call[0] == "eval"]) == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return super().eval_step(batch)

    engine = Stopped()
    finished, lines = train(tmp_path, engine, 2, val=5, eval_interval=1)
    assert not finished
    assert len([call for call in engine.calls if call[0] == "eval"]) == 8  # 5 at step 0, 3 at step 1
    assert checkpoint.saved_steps(tmp_path) == [1]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_after_the_step_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    engine = FakeEngine(on_step=lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    finished, _ = train(tmp_path, engine, 9)
    assert not finished
    assert checkpoint.saved_steps(tmp_path) == [3]
    assert signal.getsignal(number) is before


def test_second_ctrl_c_stops_immediately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 250.0)  # on a busy machine, half a second could end the test suite

    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, FakeEngine(on_step=twice), 9)


def test_second_sigterm_does_not_stop_immediately(tmp_path: Path) -> None:
    """The system sends it to every process, and a supervising parent forwards its own."""

    def twice(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    train(tmp_path, FakeEngine(on_step=twice), 9)
    assert checkpoint.saved_steps(tmp_path) == [3]


def test_ignored_sighup_stays_ignored(tmp_path: Path) -> None:
    """As with `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        engine = FakeEngine(on_step=lambda step: os.kill(os.getpid(), signal.SIGHUP))
        assert train(tmp_path, engine, 4)[0]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
