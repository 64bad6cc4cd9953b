"""Checkpoints of a run that returns to an older step, or whose best.json is damaged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anarchobot.config.schema import TrainConfig
from anarchobot.data.windows import Batch
from anarchobot.runs import async_checkpointer, checkpoint
from anarchobot.training.engine import StepResult
from tests.training.fake_engine import FakeEngine, train


class Damaged(FakeEngine):
    """The newest checkpoint, step 8, is damaged in step 9; that step and the next two are not finite."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run, self.steps, self.on_disk = run, 0, list[list[int]]()

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float, norm_limit: float) -> StepResult:
        self.steps += 1
        self.on_disk.append(sorted(checkpoint.saved_steps(self.run)))
        if self.steps == 9:
            (self.run / "step_00000008" / "model.npz").write_bytes(b"x")
        bad = self.steps in (9, 10, 11)
        return StepResult(float("nan") if bad else 1.0, 1.0, batch.inputs.size, applied=not bad)

    def load_state(self, state: dict[str, Any]) -> None:
        self.on_disk.clear()


def test_a_step_saved_after_a_return_past_a_damaged_one_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ckpt_keep 1, the damaged step 8 must not count as the newest checkpoint."""
    engine = Damaged(tmp_path)
    monkeypatch.setattr(async_checkpointer, "time", SimpleNamespace(monotonic=lambda: 60.0 * engine.steps))
    settings = {"ckpt_interval": 4, "ckpt_minutes": 1, "ckpt_keep": 1, "eval_interval": 99}
    checkpoint.write_best(tmp_path, 4, {"best_val_loss": 1.0})  # keeps step 4 beside step 8
    real = async_checkpointer.AsyncCheckpointer.save

    def save(self: async_checkpointer.AsyncCheckpointer, *args: Any) -> None:
        real(self, *args)
        self.wait()

    monkeypatch.setattr(async_checkpointer.AsyncCheckpointer, "save", save)
    _, lines = train(tmp_path, engine, 12, guard={"rollback_after": 3}, **settings)
    events = [line for line in lines if line["event"] in ("save", "resume")]
    returned = next(i for i, line in enumerate(events) if line["event"] == "resume")
    assert events[returned]["step"] == 4
    saves = [(line["step"], line["removed"]) for line in events[returned + 1 :]]
    assert saves == [(5, []), *[(step, [step - 1]) for step in range(6, 13)]]
    assert engine.on_disk == [[4], *[[4, step] for step in range(5, 12)]]
    assert (tmp_path / "step_00000008.damaged" / "model.npz").read_bytes() == b"x"
    (text,) = [line["text"] for line in lines if line["event"] == "warning"]
    assert text == f"{tmp_path}/step_00000008/model.npz: damaged (SHA-256 mismatch): renamed to NAME.damaged"


def test_no_checkpoint_is_removed_while_best_json_is_damaged(tmp_path: Path) -> None:
    results: list[async_checkpointer.SaveResult] = []
    with async_checkpointer.AsyncCheckpointer(tmp_path, TrainConfig(ckpt_keep=1), 0, results.append) as saver:
        for step in (1, 2, 3):
            saver.save(step, FakeEngine().state(), {})
            if step == 1:
                assert saver.mark_best(1, {})
                (tmp_path / "best.json").write_bytes((tmp_path / "best.json").read_bytes()[:-3])
        saver.wait()
        assert sorted(checkpoint.saved_steps(tmp_path)) == [1, 2, 3]
        assert [(r.written, r.removed, r.action) for r in results[1:]] == [(True, [], "removing old checkpoints")] * 2
        assert "best.json: damaged" in str(results[-1].error)
        assert saver.mark_best(3, {})  # a new best step replaces the file
        saver.save(4, FakeEngine().state(), {})
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 3
    assert sorted(checkpoint.saved_steps(tmp_path)) == [3, 4]


def test_a_step_that_was_just_saved_is_never_removed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 8, FakeEngine().state(), {})
    with async_checkpointer.AsyncCheckpointer(tmp_path, TrainConfig(ckpt_keep=1), 0, lambda result: None) as saver:
        saver.save(5, FakeEngine().state(), {})
    assert sorted(checkpoint.saved_steps(tmp_path)) == [5, 8]
