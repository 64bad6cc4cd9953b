"""The loop with an engine that only counts: what happens at which step, in which order, and when something fails."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.batches import Batch
from anarchobot.runs import checkpoint
from anarchobot.runs import async_checkpointer
from anarchobot.runs.progress import Progress
from anarchobot.training.engine import StepResult
from anarchobot.training.loop import MOST_SKIPPED
from tests.training.fake_engine import FakeEngine, train


def test_what_happens_when(tmp_path: Path) -> None:
    finished, lines = train(
        tmp_path, FakeEngine(), 10, sample=lambda: "text",
        log_interval=2, eval_interval=4, ckpt_interval=5, sample_interval=3,
    )  # fmt: skip
    assert finished
    at = {
        event: [line["step"] for line in lines if line["event"] == event]
        for event in ("train", "eval", "save", "sample")
    }
    # Step 4's validation is no better than step 0's, so only 5 and 10 are saved; the last step does all it can.
    assert at == {"train": [2, 4, 6, 8, 10], "eval": [0, 4, 8, 10], "save": [5, 10], "sample": [3, 6, 9]}


def test_steps_positions_and_rates_follow_each_other(tmp_path: Path) -> None:
    engine = FakeEngine()
    _, lines = train(tmp_path, engine, 3, log_interval=1, warmup_steps=4, schedule="constant")
    steps = [call for call in engine.calls if call[0] == "train"]
    assert [(s, position, lr) for _, s, position, lr, _ in steps] == [(1, 0, 0.25), (2, 6, 0.5), (3, 12, 0.75)]
    assert steps[2][4] == pytest.approx(0.85 + 0.1 * 3 / 300)
    written = [line for line in lines if line["event"] == "train"]
    assert [(line["loss"], line["lr"], line["tokens"]) for line in written] == [
        (9.0, 0.25, 24),
        (8.0, 0.5, 48),
        (7.0, 0.75, 72),
    ]


def test_the_checkpoint_comes_before_validation_and_sample(tmp_path: Path) -> None:
    """Validation may run out of memory: hours of work must be on disk by then."""
    engine = FakeEngine()

    def sample() -> str:
        engine.calls.append(("sample",))
        return ""

    train(tmp_path, engine, 2, sample=sample, eval_interval=2, ckpt_interval=2, sample_interval=2)
    assert [call[0] for call in engine.calls] == ["eval", "train", "train", "state", "eval", "sample"]


def test_the_best_checkpoint_is_saved_named_and_kept(tmp_path: Path) -> None:
    engine = FakeEngine(val_losses=[5.0, 3.0, 1.0, 4.0, 2.0])  # at steps 0, 2, 4, 6, 8
    _, lines = train(tmp_path, engine, 8, eval_interval=2, ckpt_interval=7, ckpt_keep=1)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4
    assert sorted(checkpoint.saved_steps(tmp_path)) == [4, 8]
    evals = {line["step"]: line for line in lines if line["event"] == "eval"}
    assert evals[4]["val_loss"] == 1.0
    assert evals[4]["perplexity"] == pytest.approx(2.718282, rel=1e-6)
    assert evals[4]["val_bpb"] == pytest.approx(1.442695 / 2, rel=1e-6)  # 2 bytes a token


def test_a_step_that_is_not_finite_is_said_and_passed_over(tmp_path: Path) -> None:
    finished, lines = train(tmp_path, FakeEngine(nan_at=2), 3, log_interval=1)
    assert finished
    assert [(line["event"], line["step"]) for line in lines if line["event"] in ("train", "skip")] == [
        ("train", 1),
        ("skip", 2),
        ("train", 3),
    ]


class Diverging(FakeEngine):
    """Finite up to step 4; and again, where `mends` is set, on data beyond position `mends`."""

    def __init__(self, mends: int | None = None, overflow: bool = False) -> None:
        super().__init__()
        self.loaded: list[Any] = []
        self._mends, self._overflow = mends, overflow

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
        position = int(batch.inputs[0, 0, 0])
        self.calls.append(("train", step, position))
        bad = step > 4 and (self._mends is None or position < self._mends)
        return StepResult(float("inf") if bad else 1.0, 1.0, 1, applied=not bad, overflow=bad and self._overflow)

    def load_state(self, state: dict[str, Any]) -> None:
        self.loaded.append(state)


def test_a_run_that_diverged_goes_back_past_the_data_three_times_and_ends_with_a_line(tmp_path: Path) -> None:
    engine = Diverging()
    with pytest.raises(UserError, match=r"step 7: .* again, after 3 returns to step 4: lower train.lr, or look at"):
        train(tmp_path, engine, 1000, ckpt_interval=4, eval_interval=1000, guard={"rollback_after": 3})
    # Steps 1 to 4, and 5 to 7 four times: each time from weights of step 4, and never the same data again.
    assert [call[1] for call in engine.calls if call[0] == "train"] == [1, 2, 3, 4, *[5, 6, 7] * 4]
    assert [call[2] for call in engine.calls if call[0] == "train"] == [6 * i for i in range(16)]
    assert len(engine.loaded) == 3


def test_a_run_that_gets_past_the_bad_data_goes_on(tmp_path: Path) -> None:
    engine = Diverging(mends=50)
    finished, lines = train(tmp_path, engine, 9, ckpt_interval=4, eval_interval=1000, guard={"rollback_after": 3})
    assert finished
    assert [(e["event"], e["step"]) for e in lines if e["event"] in ("skip", "resume")] == [
        *[("skip", step) for step in (5, 6, 7)], ("resume", 4), *[("skip", step) for step in (5, 6)]
    ]  # fmt: skip
    assert [e["first_window"] for e in lines if e["event"] == "skip"] == [24, 30, 36, 42, 48]
    state = checkpoint.find(tmp_path).state
    assert (state["step"], state["data_position"], state["returns"], state["returned_to"]) == (9, 6 * 12, 1, 4)


def test_without_a_checkpoint_or_without_going_back_it_ends_with_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 9: .* before the first checkpoint: lower train.lr"):
        train(tmp_path / "a", Diverging(), 1000, ckpt_interval=100, eval_interval=1000)
    never = {"rollback_after": None}
    with pytest.raises(UserError, match=rf"step {4 + MOST_SKIPPED}: .* not finite: lower train.lr, .* saved one is 4"):
        train(tmp_path / "b", Diverging(), 1000, ckpt_interval=4, eval_interval=1000, guard=never)
    with pytest.raises(UserError, match=rf"step {4 + MOST_SKIPPED}: "):  # float16's scale halves: no reason to go back
        train(tmp_path / "c", Diverging(overflow=True), 1000, ckpt_interval=4, eval_interval=1000)


def test_a_spike_is_left_out_with_its_batch_named(tmp_path: Path) -> None:
    class Spiking(FakeEngine):
        def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
            norm = 100.0 if step == 90 else 1 + 0.1 * (step % 5)
            return StepResult(1.0, norm, 1, applied=norm <= norm_limit)

    _, lines = train(tmp_path, Spiking(), 100, eval_interval=1000, ckpt_interval=1000)
    (skip,) = [line for line in lines if line["event"] == "skip"]
    assert (skip["step"], skip["reason"], skip["first_window"], skip["windows"]) == (90, "spike", 89 * 6, 6)
    norms = checkpoint.find(tmp_path).state["norms"]
    assert (len(norms), norms[89]) == (100, 100.0)


def test_out_of_memory_makes_the_micro_batches_smaller_and_keeps_the_batch(tmp_path: Path) -> None:
    class Small(FakeEngine):
        """Has room for two rows at a time, from step 3 on for one."""

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
    assert "train.micro_batch_size=3 train.grad_accum_steps=2, which is the same batch" in texts[0]
    assert "train.micro_batch_size=1 train.grad_accum_steps=6, which is the same batch" in texts[1]

    class None_(FakeEngine):
        def train_step(self, *args: Any) -> StepResult:
            raise MemoryError

    with pytest.raises(UserError, match=r"step 1: out of memory with one sequence at a time: set train.gradient_ch"):
        train(tmp_path / "none", None_(), 4)


def test_a_failed_save_is_said_and_tried_again_and_costs_no_older_checkpoint(
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
    told = [(line["step"], "No space left" in line["text"]) for line in lines if line["event"] == "warning"]
    assert told == [(4, True), (6, True)]
    assert checkpoint.saved_steps(tmp_path) == [8]
    # As soon as a minute has gone by, whatever the step.
    tries.clear()
    monkeypatch.setattr(async_checkpointer, "RETRY_SECONDS", 0.0)
    train(tmp_path / "again", FakeEngine(), 8, ckpt_interval=4, eval_interval=1000, val=0)
    assert tries == [4, 5, 8]
    # At the end it is tried until it works, or given up with a line.
    monkeypatch.setattr(async_checkpointer, "LAST_PAUSE", 0.0)
    with pytest.raises(UserError, match=r"step 6 could not be saved in 10 tries; the newest saved one is 5: make room"):
        train(tmp_path / "end", FakeEngine(), 6, ckpt_interval=5, eval_interval=1000, val=0)


def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path: Path) -> None:
    class Bad(FakeEngine):
        def state(self) -> dict[str, Any]:
            return {"params/w": np.array([1.0, np.nan], np.float32)}

    with pytest.raises(UserError, match="could not be saved"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(async_checkpointer, "LAST_PAUSE", 0.0)
        train(tmp_path, Bad(), 2, val=0)
    assert checkpoint.saved_steps(tmp_path) == []


def test_a_checkpoint_is_written_after_some_minutes_whatever_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes half a minute further with each step."""
    engine = FakeEngine()
    monkeypatch.setattr(async_checkpointer.time, "monotonic", lambda: 30.0 * sum(call[0] == "train" for call in engine.calls))
    _, lines = train(tmp_path, engine, 10, ckpt_interval=1000, ckpt_minutes=2, eval_interval=1000, val=0)
    assert [line["step"] for line in lines if line["event"] == "save"] == [4, 8, 10]


def test_damaged_shards_end_the_run_with_a_line(tmp_path: Path) -> None:
    found: list[str] = []
    engine = FakeEngine(on_step=lambda step: found.append("shards/x.npy: damaged") if step == 3 else None)
    with pytest.raises(UserError, match=r"shards/x.npy: damaged; what was trained on it since step 2 is not saved"):
        train(tmp_path, engine, 9, ckpt_interval=2, problem=lambda: found[0] if found else None)
    assert checkpoint.saved_steps(tmp_path) == [2]


def test_a_validation_that_was_made_is_not_logged_again_and_names_its_step_again(tmp_path: Path) -> None:
    """The checkpoint is older than its step's validation, and may be all that a kill has left."""
    train(tmp_path, FakeEngine([9.0, 3.0]), 4, eval_interval=4)
    (tmp_path / "best.json").unlink()
    _, lines = train(tmp_path, FakeEngine([3.0, 4.0]), 6, start=4, eval_interval=4)
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0, 4, 6]
    assert checkpoint.named_step(tmp_path / "best.json") == 4


def test_no_checkpoint_is_made_of_weights_in_doubt(tmp_path: Path) -> None:
    """Steps 5 to 8 are not finite: what is due at 6 comes at 9, and a stop at 7 leaves step 4 the newest."""
    bad = {"ckpt_interval": 2, "ckpt_keep": 9, "eval_interval": 1000, "guard": {"rollback_after": 6}}
    train(tmp_path / "on", Diverging(mends=48), 10, **bad)
    assert sorted(checkpoint.saved_steps(tmp_path / "on")) == [2, 4, 9, 10]

    class Stopped(Diverging):
        def train_step(self, batch: Batch, step: int, *rest: float) -> StepResult:
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(batch, step, *rest)

    finished, _ = train(tmp_path / "stopped", Stopped(), 20, **bad)
    assert (finished, max(checkpoint.saved_steps(tmp_path / "stopped"))) == (False, 4)


def test_a_best_step_that_can_not_be_named_yet_is_kept_and_named_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = async_checkpointer.write_sealed, []

    def full(path: Path, values: Any) -> None:
        tries.append(path.name)
        if len(tries) == 1:
            raise OSError(28, "No space left on device")
        real(path, values)

    monkeypatch.setattr(async_checkpointer, "write_sealed", full)
    settings = {"eval_interval": 2, "ckpt_interval": 2, "ckpt_keep": 1, "log_interval": 99}
    finished, lines = train(tmp_path, FakeEngine([9.0, 3.0, 4.0, 5.0, 6.0]), 8, **settings)
    assert finished and checkpoint.named_step(tmp_path / "best.json") == 2
    assert sorted(checkpoint.saved_steps(tmp_path)) == [2, 8]
    told, by_heart = [line["text"] for line in lines if line["event"] == "warning"]
    assert by_heart.startswith("validation loss has risen 3 times in a row while training loss fell")
    assert told.startswith("step 2: naming the best step failed") and tries == ["best.json"] * 2


def test_a_validation_too_large_for_memory_goes_on_by_fewer_rows(tmp_path: Path) -> None:
    class Small(FakeEngine):
        def eval_step(self, batch: Batch) -> tuple[float, int]:
            if batch.inputs.shape[1] > 1:
                raise MemoryError
            return 2.0 * batch.inputs.size, batch.inputs.size

    _, lines = train(tmp_path, Small(), 2, eval_interval=1)
    assert [line["val_loss"] for line in lines if line["event"] == "eval"] == [2.0] * 3
    (told,) = [line["text"] for line in lines if line["event"] == "warning"]
    assert told == "out of memory in validation: going on with 1 sequences at a time"


def test_a_sample_that_fails_is_no_reason_to_end(tmp_path: Path) -> None:
    def sample() -> str:
        raise UserError("the prompt is too long")

    finished, lines = train(tmp_path, FakeEngine(), 3, sample=sample, sample_interval=2)
    assert finished and [line["text"] for line in lines if line["event"] == "warning"] == [
        "no sample: the prompt is too long"
    ]


def test_no_validation_split_means_no_validation(tmp_path: Path) -> None:
    _, lines = train(tmp_path, FakeEngine(), 4, val=0, eval_interval=2)
    assert not [line for line in lines if line["event"] == "eval"]
    assert not (tmp_path / "best.json").exists()


def test_a_resumed_run_goes_on_at_its_position_without_a_first_validation(tmp_path: Path) -> None:
    engine = FakeEngine()
    train(tmp_path, engine, 6, start=4)
    assert [call[:3] for call in engine.calls if call[0] != "state"][:2] == [("train", 5, 24), ("train", 6, 30)]


def test_learning_by_heart_is_told_once_for_three_rises(tmp_path: Path) -> None:
    """Training loss falls by 1 a step; validation is made at 0, 1, 2, ... and rises at all of those after the first."""
    losses = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    _, lines = train(tmp_path, FakeEngine(losses), 7, eval_interval=1)
    assert [line["step"] for line in lines if line["event"] == "warning"] == [4, 7]  # rises at 2, 3, 4; at 5, 6, 7


def test_the_smooth_loss_is_a_mean_that_counts_later_steps_more() -> None:
    """Step k counts k times in the first 99; from there on a step counts 0.98 of the next one."""
    progress, losses = Progress(), np.random.default_rng(0).normal(5, 1, 250)
    for progress.step, loss in enumerate(losses.tolist(), start=1):
        progress.trained(loss)
        if progress.step <= 99:
            so_far = losses[: progress.step]
            assert progress.smooth_loss == pytest.approx(np.average(so_far, weights=np.arange(1, len(so_far) + 1)))
    first = 0.98**151 * np.average(losses[:99], weights=np.arange(1, 100))
    assert progress.smooth_loss == pytest.approx(first + 0.02 * 0.98 ** np.arange(150, -1, -1) @ losses[99:])
