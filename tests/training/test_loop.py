"""The loop with an engine that only counts: what happens at which step, and in which order."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch
from anarchobot.training import checkpoint
from anarchobot.training.loop import MOST_SKIPPED, Progress, Run, StepResult, run_training
from anarchobot.training.metrics import MetricsLog

MODEL = {"vocab_size": 7, "n_layers": 1, "d_model": 2, "n_heads": 1}


class CountingEngine:
    """Loss 10 - step; the batch's first number is its position."""

    def __init__(self, val_losses: list[float] | None = None, nan_at: int = 0, on_step: Any = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._val = iter(val_losses or [])
        self._nan_at, self._on_step = nan_at, on_step

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float) -> StepResult:
        self.calls.append(("train", step, int(batch.inputs[0, 0, 0]), lr, momentum))
        if self._on_step:
            self._on_step(step)
        return StepResult(float("nan") if step == self._nan_at else 10.0 - step, 1.0, batch.inputs.size)

    def eval_step(self, batch: Batch) -> tuple[float, int]:
        self.calls.append(("eval",))
        return 8 * next(self._val, 2.0), 8

    def state(self) -> dict[str, Any]:
        self.calls.append(("state",))
        return {"params/w": np.zeros(2, np.float32)}

    def load_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def peak_memory_gb(self) -> float:
        return 0.5


class Windows:
    windows = 100

    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> Batch:
        ids = np.full((micro_batches, micro_batch_size, 4), position, np.int32)
        return Batch(ids, ids)


class NoDisplay:
    def train(self, step: int, values: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...


def train(
    tmp_path: Path,
    engine: CountingEngine,
    steps: int,
    val: int = 1,
    sample: Any = None,
    start: int = 0,
    **settings: Any,
) -> tuple[bool, list[dict[str, Any]]]:
    settings = {"lr": 1.0, "min_lr": 1.0, "warmup_steps": 0, "micro_batch_size": 2, "grad_accum_steps": 3, **settings}
    config = Config.model_validate({"model": MODEL, "train": settings})
    run = Run(config, steps, {}, Windows(), [Windows().at(0, 1, 2)] * val, 2.0, tmp_path, sample)  # type: ignore[arg-type]
    progress = Progress(step=start, position=start * 6, tokens=start * 24)
    with MetricsLog(tmp_path / "logs") as log:
        finished = run_training(engine, run, progress, log, NoDisplay())
    lines = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    return finished, lines


def test_what_happens_when(tmp_path: Path) -> None:
    finished, lines = train(
        tmp_path, CountingEngine(), 10, sample=lambda: "text",
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
    engine = CountingEngine()
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
    engine = CountingEngine()

    def sample() -> str:
        engine.calls.append(("sample",))
        return ""

    train(tmp_path, engine, 2, sample=sample, eval_interval=2, ckpt_interval=2, sample_interval=2)
    assert [call[0] for call in engine.calls] == ["eval", "train", "train", "state", "eval", "sample"]


def test_the_best_checkpoint_is_saved_named_and_kept(tmp_path: Path) -> None:
    engine = CountingEngine(val_losses=[5.0, 3.0, 1.0, 4.0, 2.0])  # at steps 0, 2, 4, 6, 8
    _, lines = train(tmp_path, engine, 8, eval_interval=2, ckpt_interval=7, ckpt_keep=1)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4
    assert sorted(checkpoint.saved_steps(tmp_path)) == [4, 8]
    evals = {line["step"]: line for line in lines if line["event"] == "eval"}
    assert evals[4]["val_loss"] == 1.0
    assert evals[4]["perplexity"] == pytest.approx(2.718282, rel=1e-6)
    assert evals[4]["val_bpb"] == pytest.approx(1.442695 / 2, rel=1e-6)  # 2 bytes a token


def test_a_step_that_is_not_finite_is_said_and_passed_over(tmp_path: Path) -> None:
    finished, lines = train(tmp_path, CountingEngine(nan_at=2), 3, log_interval=1)
    assert finished
    assert [(line["event"], line["step"]) for line in lines if line["event"] in ("train", "skip")] == [
        ("train", 1),
        ("skip", 2),
        ("train", 3),
    ]


def test_a_run_that_diverged_ends_with_a_line(tmp_path: Path) -> None:
    class Diverged(CountingEngine):
        def train_step(self, batch: Batch, step: int, lr: float, momentum: float) -> StepResult:
            return StepResult(float("inf") if step > 4 else 1.0, 1.0, 1)

    with pytest.raises(UserError, match=rf"step {4 + MOST_SKIPPED}: .* not finite: lower train.lr, .* saved one is 32"):
        train(tmp_path, Diverged(), 1000, ckpt_interval=4, eval_interval=1000)


def test_a_validation_that_a_signal_prevented_is_made_up_for(tmp_path: Path) -> None:
    """Stopped at step 4, where a validation was due: the resumed run begins with it. At the last step it is made."""
    stopping = CountingEngine(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 4 else None)
    _, lines = train(tmp_path, stopping, 8, eval_interval=4)
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0]
    stopping = CountingEngine(on_step=lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 8 else None)
    finished, lines = train(tmp_path, stopping, 8, start=4, eval_interval=4)
    assert finished
    assert [line["step"] for line in lines if line["event"] == "eval"] == [0, 4, 8]


def test_a_torn_line_of_a_killed_run_does_not_swallow_the_next(tmp_path: Path) -> None:
    for text in ('{"step": 1}\n{"step": 2, "ev', '{"step": 1}\n', ""):
        (tmp_path / "metrics.jsonl").write_text(text)
        with MetricsLog(tmp_path) as log:
            log.event("resume", 2)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["event"] == "resume"
        assert "".join(lines[:-1]) == text.replace("\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    engine = CountingEngine(on_step=lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    finished, _ = train(tmp_path, engine, 9)
    assert not finished
    assert checkpoint.saved_steps(tmp_path) == [3]
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    def twice(step: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingEngine(on_step=twice), 9)


def test_no_validation_split_means_no_validation(tmp_path: Path) -> None:
    _, lines = train(tmp_path, CountingEngine(), 4, val=0, eval_interval=2)
    assert not [line for line in lines if line["event"] == "eval"]
    assert not (tmp_path / "best.json").exists()


def test_a_resumed_run_goes_on_at_its_position_without_a_first_validation(tmp_path: Path) -> None:
    engine = CountingEngine()
    train(tmp_path, engine, 6, start=4)
    assert [call[:3] for call in engine.calls if call[0] != "state"][:2] == [("train", 5, 24), ("train", 6, 30)]


def test_tensorboard_has_what_the_lines_have(tmp_path: Path) -> None:
    """Read with a reader of our own: length, checksum, event, checksum, as TFRecord files are."""
    _, lines = train(tmp_path, CountingEngine(), 4, log_interval=2, eval_interval=4)
    (file,) = (tmp_path / "logs" / "tensorboard").iterdir()
    raw, place, points = file.read_bytes(), 0, []
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 8], "little")
        event = Event.FromString(raw[place + 12 : place + 12 + size])
        points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += 12 + size + 4
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "peak_memory_gb"):
        wanted = [(line["step"], line[name]) for line in lines if line["event"] == "train"]
        assert [(step, v) for tag, step, v in points if tag == f"train/{name}"] == [
            (step, pytest.approx(v, rel=1e-6)) for step, v in wanted
        ]
    for name in ("val_loss", "val_bpb", "perplexity"):
        assert len([tag for tag, _, _ in points if tag == f"eval/{name}"]) == 2
