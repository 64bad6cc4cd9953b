"""The training loop, written once for every engine: steps, schedule, validation, checkpoints, samples, stopping."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch, Prefetched, ValBatches
from anarchobot.optim.schedule import learning_rate, muon_momentum
from anarchobot.training import checkpoint
from anarchobot.training.metrics import MetricsLog
from anarchobot.training.stop import StopRequest

MOST_SKIPPED = 30  # steps in a row that are not finite: float16's loss scale gets from its highest to 1 in fewer


@dataclass(frozen=True)
class StepResult:
    """Mean loss in nats over the step's `tokens` scored tokens, and the gradient's global norm before clipping."""

    loss: float
    grad_norm: float
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether the update was made: one that is not finite never reaches the weights."""
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)


class Engine(Protocol):
    """What trains: it holds the weights and both optimizers; the loop knows no more of it."""

    def train_step(self, batch: Batch, step: int, lr: float, momentum: float) -> StepResult: ...
    def eval_step(self, batch: Batch) -> tuple[float, int]: ...
    def state(self) -> dict[str, npt.NDArray[Any]]: ...
    def load_state(self, state: dict[str, npt.NDArray[Any]]) -> None: ...
    def peak_memory_gb(self) -> float: ...


class Display(Protocol):
    """What shows a run to a person."""

    def train(self, step: int, values: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass
class Progress:
    """Where a run stands: all of it goes into a checkpoint. `position` counts the windows consumed."""

    step: int = 0
    position: int = 0
    tokens: int = 0
    loss: float | None = None
    best_val_loss: float | None = None
    best_val_bpb: float | None = None
    wall_seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """What a run is made of. `identity` goes into every checkpoint and must be the same on resume."""

    config: Config
    steps: int
    identity: dict[str, Any]
    train: Prefetched
    val: ValBatches
    bytes_per_token: float  # of the validation split: nats per token into bits per byte
    folder: Path
    sample: Callable[[], str] | None = None


def run_training(engine: Engine, run: Run, progress: Progress, log: MetricsLog, display: Display) -> bool:
    """Trains from `progress` to the last step; returns whether it got there (False: somebody asked it to stop).

    A fresh run begins with a validation, so that the curve has a start. At each step that calls for several things the
    checkpoint comes first: nothing that follows can cost it.
    """
    train = run.config.train
    started = time.monotonic() - progress.wall_seconds
    # A run that goes on from another folder's step has nothing of its own yet.
    saved = progress.step if progress.step in checkpoint.saved_steps(run.folder) else 0
    line_seconds, line_tokens = 0.0, 0  # spent in steps since the last metrics line, without validation and saving
    skipped = 0  # steps in a row
    # A fresh run, or one that was stopped between a step's checkpoint and its validation.
    due = progress.step < run.steps and progress.step % train.eval_interval == 0
    if due and _validate(engine, run, progress, log, display):
        saved = _keep_best(engine, run, progress, log, saved)
    with StopRequest() as stop:
        while progress.step < run.steps and not stop.requested:
            step = progress.step + 1
            step_began = time.monotonic()
            batch = run.train.at(progress.position, train.grad_accum_steps, train.micro_batch_size)
            lr = learning_rate(step, train, run.steps)
            result = engine.train_step(batch, step, lr, muon_momentum(step, train))
            progress.step = step
            progress.position += train.grad_accum_steps * train.micro_batch_size
            progress.tokens += batch.inputs.size
            progress.wall_seconds = time.monotonic() - started
            line_seconds += time.monotonic() - step_began
            line_tokens += batch.inputs.size

            skipped = 0 if result.finite else skipped + 1
            if skipped == MOST_SKIPPED:
                raise UserError(
                    f"step {step}: {skipped} steps in a row had a loss or gradient that is not finite: lower train.lr, "
                    f"or go on from an earlier step (the newest saved one is {saved})"
                )
            if not result.finite:
                log.event("skip", step, loss=repr(result.loss), grad_norm=repr(result.grad_norm))
                display.note(f"step {step}: loss or gradient is not finite: this update is left out")
            else:
                progress.loss = result.loss
            if result.finite and (step % train.log_interval == 0 or step == run.steps):
                values = {
                    "loss": result.loss,
                    "lr": lr,
                    "grad_norm": result.grad_norm,
                    "tokens": progress.tokens,
                    "tokens_per_second": round(line_tokens / max(1e-9, line_seconds), 1),
                    "peak_memory_gb": round(engine.peak_memory_gb(), 4),
                }
                log.event("train", step, **values)
                display.train(step, values)
                line_seconds, line_tokens = 0.0, 0

            last = step == run.steps
            if step % train.ckpt_interval == 0 or last or stop.requested:
                _save(engine, run, progress, log)
                saved = step
            due = last or (step % train.eval_interval == 0 and not stop.requested)
            if due and _validate(engine, run, progress, log, display):
                saved = _keep_best(engine, run, progress, log, saved)
            if train.sample_interval and step % train.sample_interval == 0 and run.sample and not stop.requested:
                text = run.sample()
                log.event("sample", step, text=text)
                display.note(f"step {step}: sample: {text}")
        if stop.requested and saved != progress.step:
            _save(engine, run, progress, log)
    return progress.step >= run.steps


def _save(engine: Engine, run: Run, progress: Progress, log: MetricsLog) -> None:
    state = {
        **run.identity,
        "tokens": progress.tokens,
        "data_position": progress.position,
        # Dropout and the order of the data are functions of these two: there is no generator to save.
        "random_state": {"seed": run.config.train.seed, "step": progress.step},
        "loss": progress.loss,
        "best_val_loss": progress.best_val_loss,
        "best_val_bpb": progress.best_val_bpb,
        "wall_seconds": round(progress.wall_seconds, 3),
        "config": run.config.model_dump(),
    }
    folder = checkpoint.save(run.folder, progress.step, engine.state(), state)
    removed = checkpoint.rotate(run.folder, run.config.train.ckpt_keep)
    log.event("save", progress.step, folder=folder.name, removed=removed)


def _keep_best(engine: Engine, run: Run, progress: Progress, log: MetricsLog, saved: int) -> int:
    """Saves this step, unless it is the one that is `saved`, and names it the best; returns the step saved last."""
    if saved != progress.step:
        _save(engine, run, progress, log)
    best = {"best_val_loss": progress.best_val_loss, "best_val_bpb": progress.best_val_bpb}
    folder = f"step_{progress.step:08d}"
    checkpoint.write_json(run.folder / "best.json", {"step": progress.step, "folder": folder, **best})
    return progress.step


def _validate(engine: Engine, run: Run, progress: Progress, log: MetricsLog, display: Display) -> bool:
    """Validates and logs; returns whether it is the best so far and there is a step to call so."""
    if len(run.val) == 0:
        return False
    sums = np.array([engine.eval_step(run.val[i]) for i in range(len(run.val))], np.float64)
    loss = float(sums[:, 0].sum() / sums[:, 1].sum())
    values = {
        "val_loss": loss,
        "val_bpb": loss / math.log(2) / run.bytes_per_token,
        "perplexity": math.exp(min(loss, 700.0)),
    }
    log.event("eval", progress.step, **values)
    display.note(
        f"step {progress.step}: validation loss {loss:.4f}, {values['val_bpb']:.4f} bits per byte, "
        f"perplexity {values['perplexity']:.2f}"
    )
    if not math.isfinite(loss) or (progress.best_val_loss is not None and loss >= progress.best_val_loss):
        return False
    progress.best_val_loss, progress.best_val_bpb = loss, values["val_bpb"]
    return progress.step > 0
