"""The training loop with a fake engine: the order of events, and how failures are handled."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.windows import Batch
from anarchobot.runs import async_checkpointer, checkpoint
from anarchobot.runs.progress import Progress
from anarchobot.system.gpu_watchdog import GPUTimeoutError
from anarchobot.training.engine import StepResult
from anarchobot.training.loop import MAX_SKIPPED_STEPS
from tests.training.fake_engine import FakeEngine, NullDisplay, train


def test_schedule_of_events(tmp_path: Path) -> None:
    finished, lines = train(
        tmp_path, FakeEngine(), 10, sample=lambda: "text",
        log_interval=2, eval_interval=4, ckpt_interval=5, sample_interval=3,
    )  # fmt: skip
    assert finished
    at = {
        event: [line["step"] for line in lines if line["event"] == event]
        for event in ("train", "eval", "save", "sample")
    }
    # Step 4's validation does not improve on step 0's, so only 5 and 10 are saved.
    assert at == {"train": [2, 4, 6, 8, 10], "eval": [0, 4, 8, 10], "save": [5, 10], "sample": [3, 6, 9]}


def test_steps_positions_and_learning_rates(tmp_path: Path) -> None:
    engine = FakeEngine()
    _, lines = train(tmp_path, engine, 3, log_interval=1, warmup_steps=4, schedule="constant")
    steps = [call for call in engine.calls if call[0] == "train"]
    assert [(s, position, lr) for _, s, position, lr, _ in steps] == [(1, 0, 0.25), (2, 6, 0.5), (3, 12, 0.75)]
    assert steps[2][4] == pytest.approx(0.85 + 0.1 * 3 / 300)
    logged = [line for line in lines if line["event"] == "train"]
    assert [(line["loss"], line["lr"], line["tokens"]) for line in logged] == [
        (9.0, 0.25, 24),
        (8.0, 0.5, 48),
        (7.0, 0.75, 72),
    ]


def test_every_step_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its smoothed loss, whatever train.log_interval says."""
    shown: list[tuple[float, ...]] = []
    monkeypatch.setattr(NullDisplay, "step", lambda self, *values: shown.append(values))
    train(tmp_path, FakeEngine(), 3, log_interval=99)
    assert shown == [(1, 9.0), (2, pytest.approx(9 - 2 / 3)), (3, pytest.approx((9 - 2 / 3 + 7) / 2))]


def test_checkpoint_is_saved_before_validation_and_sample(tmp_path: Path) -> None:
    """Validation may run out of memory; the checkpoint must be on disk by then."""
    engine = FakeEngine()

    def sample() -> str:
        engine.calls.append(("sample",))
        return ""

    train(tmp_path, engine, 2, sample=sample, eval_interval=2, ckpt_interval=2, sample_interval=2)
    assert [call[0] for call in engine.calls] == ["eval", "train", "train", "state", "eval", "sample"]


def test_best_checkpoint_is_saved_and_kept(tmp_path: Path) -> None:
    engine = FakeEngine(val_losses=[5.0, 3.0, 1.0, 4.0, 2.0])  # at steps 0, 2, 4, 6, 8
    _, lines = train(tmp_path, engine, 8, eval_interval=2, ckpt_interval=7, ckpt_keep=1)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4
    assert sorted(checkpoint.saved_steps(tmp_path)) == [4, 8]
    evals = {line["step"]: line for line in lines if line["event"] == "eval"}
    assert evals[4]["val_loss"] == 1.0
    assert evals[4]["perplexity"] == pytest.approx(2.718282, rel=1e-6)
    assert evals[4]["val_bpb"] == pytest.approx(1.442695 / 2, rel=1e-6)  # 2 bytes per token


def test_non_finite_step_is_logged_and_skipped(tmp_path: Path) -> None:
    """Its norm is finite, and still not part of the statistics of norms."""
    finished, lines = train(tmp_path, FakeEngine(nan_at=2), 3, log_interval=1)
    assert finished
    assert [line["reason"] for line in lines if line["event"] == "skip"] == ["not finite"]
    assert checkpoint.find(tmp_path).state["norms"] == [1.0, 1.0]
    assert [(line["event"], line["step"]) for line in lines if line["event"] in ("train", "skip")] == [
        ("train", 1),
        ("skip", 2),
        ("train", 3),
    ]


class Diverging(FakeEngine):
    """Finite up to step 4, and again on data from position `recovers_at` on."""

    def __init__(self, recovers_at: int | None = None, overflow: bool = False) -> None:
        super().__init__()
        self.loaded: list[Any] = []
        self._recovers_at, self._overflow = recovers_at, overflow

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
        position = int(batch.inputs[0, 0, 0])
        self.calls.append(("train", step, position))
        bad = step > 4 and (self._recovers_at is None or position < self._recovers_at)
        return StepResult(float("inf") if bad else 1.0, 1.0, 1, applied=not bad, overflow=bad and self._overflow)

    def load_state(self, state: dict[str, Any]) -> None:
        self.loaded.append(state)


def test_diverged_run_rolls_back_three_times_then_fails(tmp_path: Path) -> None:
    engine = Diverging()
    with pytest.raises(UserError, match=r"step 7: .* again after 3 rollbacks to step 4: lower train.lr"):
        train(tmp_path, engine, 1000, ckpt_interval=4, eval_interval=1000, guard={"rollback_after": 3})
    # Steps 1 to 4, then 5 to 7 four times, each time from the weights of step 4 and with new data.
    assert [call[1] for call in engine.calls if call[0] == "train"] == [1, 2, 3, 4, *[5, 6, 7] * 4]
    assert [call[2] for call in engine.calls if call[0] == "train"] == [6 * i for i in range(16)]
    assert len(engine.loaded) == 3


def test_run_continues_after_the_bad_data(tmp_path: Path) -> None:
    engine = Diverging(recovers_at=50)
    finished, lines = train(tmp_path, engine, 9, ckpt_interval=4, eval_interval=1000, guard={"rollback_after": 3})
    assert finished
    assert [(e["event"], e["step"]) for e in lines if e["event"] in ("skip", "resume")] == [
        *[("skip", step) for step in (5, 6, 7)], ("resume", 4), *[("skip", step) for step in (5, 6)]
    ]  # fmt: skip
    assert [e["first_window"] for e in lines if e["event"] == "skip"] == [24, 30, 36, 42, 48]
    state = checkpoint.find(tmp_path).state
    assert (state["step"], state["data_position"], state["returns"], state["returned_to"]) == (9, 6 * 12, 1, 4)


def test_divergence_without_checkpoint_or_rollback_fails(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 9: .* before the first checkpoint: lower train.lr"):
        train(tmp_path / "a", Diverging(), 1000, ckpt_interval=100, eval_interval=1000)
    never = {"rollback_after": None}
    with pytest.raises(UserError, match=rf"step {4 + MAX_SKIPPED_STEPS}: .* not finite .*: lower train.lr, .* step 4"):
        train(tmp_path / "b", Diverging(), 1000, ckpt_interval=4, eval_interval=1000, guard=never)
    with pytest.raises(UserError, match=rf"step {4 + MAX_SKIPPED_STEPS}: "):  # float16 halves its loss scale
        train(tmp_path / "c", Diverging(overflow=True), 1000, ckpt_interval=4, eval_interval=1000)


def test_spike_is_skipped_and_its_batch_logged(tmp_path: Path) -> None:
    class Spiking(FakeEngine):
        def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
            norm = 100.0 if step == 90 else 1 + 0.1 * (step % 5)
            return StepResult(1.0, norm, 1, applied=norm <= norm_limit)

    _, lines = train(tmp_path, Spiking(), 100, eval_interval=1000, ckpt_interval=1000)
    (skip,) = [line for line in lines if line["event"] == "skip"]
    assert (skip["step"], skip["reason"], skip["first_window"], skip["windows"]) == (90, "spike", 89 * 6, 6)
    state = checkpoint.find(tmp_path).state
    assert (len(state["norms"]), state["norms"][89], state["skipped_steps"]) == (100, 100.0, 1)


def test_skipped_updates_are_shown_only_if_they_call_for_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are not finite, and MANY_SPIKES spikes within the window; not single spikes, and not float16's loss
    scale, which is too large at first."""
    shown: list[str] = []
    monkeypatch.setattr(NullDisplay, "message", lambda self, text: shown.append(text))

    class Skipping(FakeEngine):
        def __init__(self, *steps: int, loss: float = 1.0, overflow: bool = False) -> None:
            super().__init__()
            self._steps, self._loss, self._overflow = steps, loss, overflow

        def train_step(self, batch: Batch, step: int, *rest: float) -> StepResult:
            bad = step in self._steps
            return StepResult(self._loss if bad else 1.0, 9.0, 1, applied=not bad, overflow=bad and self._overflow)

    def shown_by(engine: FakeEngine) -> list[str]:
        shown.clear()
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        train(folder, engine, 300, eval_interval=1000, ckpt_interval=1000, val=0)
        assert checkpoint.find(folder).state["skipped_steps"] == len(engine._steps)  # type: ignore[attr-defined]
        return list(shown)

    assert shown_by(Skipping(1, 50, 100, 129, 260)) == []
    (warning,) = shown_by(Skipping(1, 20, 50, 100, 128, 200))
    assert warning.startswith("warning: step 128: ") and "lower train.lr" in warning
    assert [text.partition(":")[0] for text in shown_by(Skipping(3, 5, loss=float("inf")))] == ["step 3", "step 5"]
    assert shown_by(Skipping(3, 4, loss=float("inf"), overflow=True)) == []


def test_out_of_memory_shrinks_the_micro_batch_and_keeps_the_batch(tmp_path: Path) -> None:
    class Small(FakeEngine):
        """Fits two rows, from step 3 on one."""

        def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
            if batch.inputs.shape[1] > (2 if step < 3 else 1):
                raise MemoryError
            self.calls.append((step, batch.inputs.shape[:2], int(batch.inputs[0, 0, 0])))
            return StepResult(1.0, 1.0, 1)

    engine = Small()
    _, lines = train(tmp_path, engine, 4, micro_batch_size=6, grad_accum_steps=1, eval_interval=1000, val=0)
    assert [call for call in engine.calls if call[0] != "state"] == [
        (1, (6, 1), 0), (2, (6, 1), 6), (3, (6, 1), 12), (4, (6, 1), 18)
    ]  # fmt: skip
    texts = [line["text"] for line in lines if line["event"] == "warning"]
    assert "train.micro_batch_size=3 train.grad_accum_steps=2 (same batch)" in texts[0]
    assert "train.micro_batch_size=1 train.grad_accum_steps=6 (same batch)" in texts[1]

    class TooSmall(FakeEngine):
        def train_step(self, *args: Any) -> StepResult:
            raise MemoryError

    with pytest.raises(UserError, match=r"step 1: out of memory with train.micro_batch_size=1: set train.gradient_ch"):
        train(tmp_path / "none", TooSmall(), 4)


def _wait_and_poll(
    saver: async_checkpointer.AsyncCheckpointer, poll: Any = async_checkpointer.AsyncCheckpointer.poll
) -> None:
    for save in saver._pending:
        save.exception()
    poll(saver)


def test_failed_save_is_reported_retried_and_keeps_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At steps 4 and 6 the disk is full."""
    real, tries = checkpoint.save, []

    def save(run: Path, step: int, *rest: Any) -> Path:
        tries.append(step)
        if step in (4, 6):
            raise OSError(28, "No space left on device")
        return real(run, step, *rest)

    monkeypatch.setattr(checkpoint, "save", save)
    finished, lines = train(tmp_path, FakeEngine(), 8, ckpt_interval=2, ckpt_keep=1, eval_interval=1000, val=0)
    assert finished
    assert tries == [2, 4, 6, 8]
    warnings = [(line["step"], "No space left" in line["text"]) for line in lines if line["event"] == "warning"]
    assert warnings == [(4, True), (6, True)]
    assert checkpoint.saved_steps(tmp_path) == [8]
    # Retried after RETRY_SECONDS, at any step. Each step waits for its save.
    tries.clear()
    monkeypatch.setattr(async_checkpointer.AsyncCheckpointer, "poll", _wait_and_poll)
    monkeypatch.setattr(async_checkpointer, "RETRY_SECONDS", 0.0)
    train(tmp_path / "again", FakeEngine(), 8, ckpt_interval=4, eval_interval=1000, val=0)
    assert tries == [4, 5, 8]
    # At the end it is retried a limited number of times.
    monkeypatch.setattr(async_checkpointer, "FINAL_PAUSE", 0.0)
    with pytest.raises(UserError, match=r"step 6 could not be saved in 10 attempts; newest checkpoint: step 5: free"):
        train(tmp_path / "end", FakeEngine(), 6, ckpt_interval=5, eval_interval=1000, val=0)


def test_non_finite_weights_are_not_saved(tmp_path: Path) -> None:
    class Bad(FakeEngine):
        def state(self) -> dict[str, Any]:
            return {"params/w": np.array([1.0, np.nan], np.float32)}

    with pytest.raises(UserError, match="could not be saved"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_checkpointer, "FINAL_PAUSE", 0.0)
        train(tmp_path, Bad(), 2, val=0)
    assert checkpoint.saved_steps(tmp_path) == []


def test_checkpoint_interval_in_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances half a minute per step."""
    engine = FakeEngine()
    clock = SimpleNamespace(monotonic=lambda: 30.0 * sum(call[0] == "train" for call in engine.calls))
    monkeypatch.setattr(async_checkpointer, "time", clock)
    _, lines = train(tmp_path, engine, 10, ckpt_interval=1000, ckpt_minutes=2, eval_interval=1000, val=0)
    assert [line["step"] for line in lines if line["event"] == "save"] == [4, 8, 10]


def test_damaged_shards_stop_the_run(tmp_path: Path) -> None:
    found: list[str] = []
    engine = FakeEngine(on_step=lambda step: found.append("shards/x.npy: damaged") if step == 3 else None)
    with pytest.raises(UserError, match=r"shards/x.npy: damaged; training since step 2 .* was not saved"):
        train(tmp_path, engine, 9, ckpt_interval=2, data_error=lambda: found[0] if found else None)
    assert checkpoint.saved_steps(tmp_path) == [2]


def test_repeated_validation_restores_best_json_but_is_not_logged_again(tmp_path: Path) -> None:
    """A checkpoint predates the validation of its own step, and may be all that is left after a kill."""
    train(tmp_path, FakeEngine([9.0, 3.0]), 4, eval_interval=4)
    (tmp_path / "best.json").unlink()
    _, lines = train(tmp_path, FakeEngine([3.0, 4.0]), 6, start=4, eval_interval=4)
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0, 4, 6]
    assert checkpoint.best_step(tmp_path) == 4


def test_suspect_weights_are_not_saved(tmp_path: Path) -> None:
    """Steps 5 to 8 are not finite: the save due at 6 happens at 9, and after a stop at 7 step 4 is the newest."""
    bad = {"ckpt_interval": 2, "ckpt_keep": 9, "eval_interval": 1000, "guard": {"rollback_after": 6}}
    train(tmp_path / "on", Diverging(recovers_at=48), 10, **bad)
    assert sorted(checkpoint.saved_steps(tmp_path / "on")) == [2, 4, 9, 10]

    class Stopped(Diverging):
        def train_step(self, batch: Batch, step: int, *rest: float) -> StepResult:
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(batch, step, *rest)

    finished, _ = train(tmp_path / "stopped", Stopped(), 20, **bad)
    assert (finished, max(checkpoint.saved_steps(tmp_path / "stopped"))) == (False, 4)


def test_failed_write_of_best_json_is_retried_and_its_step_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = checkpoint.write_best, []

    def full(run: Path, step: int, values: Any) -> None:
        tries.append(step)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        real(run, step, values)

    monkeypatch.setattr(checkpoint, "write_best", full)
    settings = {"eval_interval": 2, "ckpt_interval": 2, "ckpt_keep": 1, "log_interval": 99}
    finished, lines = train(tmp_path, FakeEngine([9.0, 3.0, 4.0, 5.0, 6.0]), 8, **settings)
    assert finished and checkpoint.best_step(tmp_path) == 2
    assert sorted(checkpoint.saved_steps(tmp_path)) == [2, 8]
    failed, overfitting = [line["text"] for line in lines if line["event"] == "warning"]
    assert overfitting.startswith("overfitting: validation loss rose 3 times in a row")
    assert failed.startswith("step 2: writing best.json failed") and tries == [2, 2]


def test_out_of_memory_in_validation_shrinks_its_micro_batch(tmp_path: Path) -> None:
    class Small(FakeEngine):
        def eval_step(self, batch: Batch) -> tuple[float, int]:
            if batch.inputs.shape[1] > 1:
                raise MemoryError
            return 2.0 * batch.inputs.size, batch.inputs.size

    _, lines = train(tmp_path, Small(), 2, eval_interval=1)
    assert [line["val_loss"] for line in lines if line["event"] == "eval"] == [2.0] * 3
    (text,) = [line["text"] for line in lines if line["event"] == "warning"]
    assert text == "validation: out of memory: continuing with a micro-batch size of 1"


def test_a_stop_by_the_watchdog_shrinks_the_micro_batch_and_says_what_helps(tmp_path: Path) -> None:
    class Stopped(FakeEngine):
        """macOS stops micro-batches of more than one row."""

        def _check(self, batch: Batch) -> None:
            if batch.inputs.shape[1] > 1:
                raise GPUTimeoutError("macOS stopped the GPU's work: let the display sleep")

        def train_step(self, batch: Batch, step: int, *rest: float) -> StepResult:
            self._check(batch)
            return StepResult(1.0, 1.0, 1)

        def eval_step(self, batch: Batch) -> tuple[float, int]:
            self._check(batch)
            return 2.0 * batch.inputs.size, batch.inputs.size

    finished, lines = train(tmp_path, Stopped(), 2, eval_interval=1)
    assert finished
    assert [line["text"] for line in lines if line["event"] == "warning"] == [
        "validation: macOS stopped the GPU's work: let the display sleep: continuing with a micro-batch size of 1",
        "step 1: macOS stopped the GPU's work: let the display sleep: continuing with train.micro_batch_size=1 "
        "train.grad_accum_steps=6 (same batch)",
    ]

    class AlwaysStopped(Stopped):
        def _check(self, batch: Batch) -> None:
            raise GPUTimeoutError("macOS stopped the GPU's work: let the display sleep")

    with pytest.raises(GPUTimeoutError, match=r"^step 1: macOS stopped .*: let the display sleep$") as caught:
        train(tmp_path / "always", AlwaysStopped(), 2, val=0)
    assert caught.value.exit_code == 1


def test_failed_sample_does_not_stop_the_run(tmp_path: Path) -> None:
    def sample() -> str:
        raise UserError("the prompt is too long")

    finished, lines = train(tmp_path, FakeEngine(), 3, sample=sample, sample_interval=2)
    assert finished and [line["text"] for line in lines if line["event"] == "warning"] == [
        "sampling failed: the prompt is too long"
    ]


def test_empty_validation_split(tmp_path: Path) -> None:
    _, lines = train(tmp_path, FakeEngine(), 4, val=0, eval_interval=2)
    assert not [line for line in lines if line["event"] == "eval"]
    assert not (tmp_path / "best.json").exists()


def test_resumed_run_continues_at_its_position_without_initial_validation(tmp_path: Path) -> None:
    engine = FakeEngine()
    train(tmp_path, engine, 6, start=4)
    assert [call[:3] for call in engine.calls if call[0] != "state"][:2] == [("train", 5, 24), ("train", 6, 30)]


def test_overfitting_warning_once_per_three_rises(tmp_path: Path) -> None:
    """Training loss falls by 1 per step; validation loss, at steps 0, 1, 2, ..., always rises."""
    losses = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    _, lines = train(tmp_path, FakeEngine(losses), 7, eval_interval=1)
    assert [line["step"] for line in lines if line["event"] == "warning"] == [4, 7]  # rises at 2, 3, 4; at 5, 6, 7


def test_smooth_loss_weights_later_steps_more() -> None:
    """Step k has weight k up to 99; after that, each step has 0.98 of the weight of the next."""
    progress, losses = Progress(), np.random.default_rng(0).normal(5, 1, 250)
    for progress.step, loss in enumerate(losses.tolist(), start=1):
        progress.record_train_loss(loss)
        if progress.step <= 99:
            so_far = losses[: progress.step]
            assert progress.smooth_loss == pytest.approx(np.average(so_far, weights=np.arange(1, len(so_far) + 1)))
    first = 0.98**151 * np.average(losses[:99], weights=np.arange(1, 100))
    assert progress.smooth_loss == pytest.approx(first + 0.02 * 0.98 ** np.arange(150, -1, -1) @ losses[99:])


def test_a_save_is_logged_with_its_folder_and_the_removed_steps(tmp_path: Path) -> None:
    _, lines = train(tmp_path, FakeEngine(), 4, ckpt_interval=2, ckpt_keep=1, eval_interval=99, val=0)
    saves = [(line["folder"], line["removed"]) for line in lines if line["event"] == "save"]
    assert saves == [("step_00000002", []), ("step_00000004", [2])]
