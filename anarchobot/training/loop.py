"""The training loop for all engines: steps, schedule, validation, checkpoints, samples, stopping and recovery."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.data.batches import TrainSource, ValSource
from anarchobot.data.windows import Batch
from anarchobot.optim.schedule import learning_rate, muon_momentum, split_micro_batch
from anarchobot.runs import checkpoint
from anarchobot.runs.async_checkpointer import AsyncCheckpointer, SaveResult
from anarchobot.runs.metrics_log import MetricsLog
from anarchobot.runs.progress import OVERFITTING_RISES, Progress
from anarchobot.system.gpu_watchdog import GPUTimeoutError
from anarchobot.training.display import TerminalDisplay
from anarchobot.training.engine import Engine, StepResult
from anarchobot.training.guard import Guard
from anarchobot.training.ranks import SINGLE_PROCESS, Ranks
from anarchobot.training.signals import StopRequest

MAX_SKIPPED_STEPS = 30  # consecutive non-finite steps; float16's loss scale falls from its maximum to 1 in fewer
MAX_ROLLBACKS = 3  # to the same checkpoint
MANY_SPIKES = 5  # within guard.spike_window steps: fewer are normal, and only counted
VAL_NAMES = {"val_loss": "validation loss", "val_bpb": "bits per byte"}


@dataclass(frozen=True)
class Run:
    """Everything that the loop needs in addition to the engine.

    identity:         identifies the data and base model in every checkpoint (tasks/resume.py)
    train, val:       batches; with several `ranks`, `train` yields this rank's part of a step
    bytes_per_token:  of the validation split, converts nats per token to bits per byte; None: the loss is not per token
    sample:           generates a sample from the current weights
    data_error:       returns the damage found by the background check of the shards
    val_metrics:      returns additional validation metrics
    throughput:       converts tokens per second to additional metrics
    """

    config: Config
    steps: int
    identity: dict[str, Any]
    train: TrainSource
    val: ValSource
    bytes_per_token: float | None
    folder: Path
    sample: Callable[[], str] | None = None
    data_error: Callable[[], str | None] = lambda: None
    val_metrics: Callable[[], Mapping[str, float]] = dict
    throughput: Callable[[float], Mapping[str, float]] = lambda tokens_per_second: {}
    ranks: Ranks = SINGLE_PROCESS


def run_training(
    engine: Engine, run: Run, progress: Progress, log: MetricsLog | None, display: TerminalDisplay
) -> bool:
    """Trains from `progress` to the last step. Returns whether it finished; False if it was asked to stop. `log` is
    None on ranks other than 0.

    A new run starts with a validation. If a step calls for several actions, the checkpoint comes first and is on disk
    before the next one starts, so that no later failure can lose it.
    """
    # A run resumed from another folder's checkpoint has no checkpoint in this folder yet.
    newest = progress.step if progress.step in checkpoint.saved_steps(run.folder) else 0
    loop = _TrainingLoop(engine, run, progress, log, display)
    is_main = run.ranks.rank == 0
    with (
        StopRequest(quiet=not is_main) as stop,
        AsyncCheckpointer(run.folder, run.config.train, newest, loop.report_save, enabled=is_main) as saver,
        run.ranks,
    ):
        return loop.run(stop, saver)


class _TrainingLoop:
    def __init__(
        self, engine: Engine, run: Run, progress: Progress, log: MetricsLog | None, display: TerminalDisplay
    ) -> None:
        self._engine, self._run, self._progress, self._log, self._display = engine, run, progress, log, display
        self._train = run.config.train
        self._ranks = run.ranks
        self._guard = Guard(run.config.guard, progress.norms)
        self._micro_batches, self._rows = self._train.grad_accum_steps, self._train.micro_batch_size
        self._eval_rows = self._rows
        self._began = time.monotonic() - progress.wall_seconds
        self._line_seconds, self._line_tokens = 0.0, 0  # since the last log line, without validation and saving
        self._skipped = 0  # consecutive non-finite steps
        self._spikes: list[int] = []  # steps of the spikes since the last warning, of the last guard.spike_window steps

    def run(self, stop: StopRequest, saver: AsyncCheckpointer) -> bool:
        """Returns whether everything is done, including the last validation."""
        self._stop, self._saver = stop, saver
        progress, train, save_due = self._progress, self._train, False
        # A checkpoint predates the validation of its own step. On resume that validation is repeated to update the
        # best step, but not logged twice.
        already_logged = self._log is not None and progress.step in self._log.steps_of("eval")
        validated = not self._is_validation_due() or self._validate(already_logged=already_logged)
        while progress.step < self._run.steps and not self._ranks.any(stop.requested or self._is_patience_exhausted()):
            if error := self._run.data_error():
                saver.wait()
                raise UserError(
                    f"{error}; training since step {saver.newest} used the corrupted shard and was not saved"
                )
            self._step()
            if self._guard.should_roll_back:
                self._roll_back()
                continue
            save_due = save_due or saver.is_due(progress.step) or progress.step == self._run.steps or stop.requested
            if save_due and not self._guard.last_step_was_bad:
                self._save()
                save_due = False
            validated = not self._is_validation_due() or self._validate()
            if train.sample_interval and progress.step % train.sample_interval == 0 and not stop.requested:
                self._sample()
            saver.poll()
        done = progress.step >= self._run.steps
        # Suspect weights are not saved: the steps since the newest checkpoint are trained again on resume.
        if progress.step > saver.newest and (done or not self._guard.last_step_was_bad):
            saver.finish(progress.step, self._engine.state, self._state())
        saver.retry_best()
        return (done or self._is_patience_exhausted()) and validated

    def _step(self) -> None:
        run, progress, train = self._run, self._progress, self._train
        step, began = progress.step + 1, time.monotonic()
        lr, momentum = learning_rate(step, train, run.steps), muon_momentum(step, train)
        norm_limit = self._guard.norm_limit
        while True:
            try:
                batch = run.train.at(progress.position, self._micro_batches, self._rows)
                result = self._engine.train_step(batch, step, lr, momentum, norm_limit)
                break
            except (MemoryError, GPUTimeoutError) as error:
                self._shrink_micro_batch(step, error)
        self._guard.observe(result.grad_norm, finite=result.finite, overflow=result.overflow)
        position, progress.step = progress.position, step
        tokens = self._ranks.size * batch.inputs.size
        progress.position += self._ranks.size * batch.inputs.shape[0] * batch.inputs.shape[1]
        progress.tokens += tokens
        progress.wall_seconds = time.monotonic() - self._began
        self._line_seconds += time.monotonic() - began
        self._line_tokens += tokens
        if result.applied:
            self._skipped = 0
            smooth_loss = progress.record_train_loss(result.loss)
            self._display.step(step, smooth_loss)
            if step % train.log_interval == 0 or step == run.steps:
                self._log_step(result, lr)
        else:
            self._log_skipped(result, position)

    def _log_step(self, result: StepResult, lr: float) -> None:
        tokens_per_second = round(self._line_tokens / max(1e-9, self._line_seconds), 1)
        values = {
            "loss": result.loss,
            "smooth_loss": self._progress.smooth_loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": self._progress.tokens,
            "tokens_per_second": tokens_per_second,
            **self._run.throughput(tokens_per_second),
            "peak_memory_gb": round(self._engine.peak_memory_gb(), 4),
            **{name: round(gb, 4) for name, gb in self._engine.memory_gb().items()},
            **result.extra,
        }
        self._log_event("train", self._progress.step, **values)
        self._display.train(self._progress.step, values)
        self._line_seconds, self._line_tokens = 0.0, 0

    def _log_skipped(self, result: StepResult, position: int) -> None:
        step = self._progress.step
        # Identifies the batch: the run's windows are numbered from 0.
        batch = {"first_window": position, "windows": self._progress.position - position}
        values = {"loss": repr(result.loss), "grad_norm": repr(result.grad_norm), **batch}
        self._log_event("skip", step, reason="spike" if result.finite else "not finite", **values)
        self._progress.skipped_steps += 1
        if result.finite:
            self._record_spike(step)
        elif not result.overflow:  # float16's loss scale was too large: normal at the start of a run
            self._display.message(f"step {step}: loss or gradient is not finite: update skipped")
        self._skipped = 0 if result.finite else self._skipped + 1
        if self._skipped == MAX_SKIPPED_STEPS:
            self._wait_for_saves()
            raise UserError(
                f"step {step}: loss or gradient not finite for {self._skipped} consecutive steps: lower train.lr, or "
                f"resume from an earlier step (newest checkpoint: step {self._saver.newest})"
            )

    def _record_spike(self, step: int) -> None:
        window = self._run.config.guard.spike_window
        self._spikes = [*(earlier for earlier in self._spikes if earlier > step - window), step]
        if len(self._spikes) == MANY_SPIKES:
            self._spikes = []
            self._warn(
                f"{MANY_SPIKES} of the last {window} updates were skipped, because the norm of the gradient was far "
                "above its mean: lower train.lr, or check the data at the skipped steps in metrics.jsonl"
            )

    def _roll_back(self) -> None:
        """Restores the weights of the newest checkpoint but keeps the data position, to skip the bad batches."""
        if self._ranks.rank == 0:
            self._load_newest()
        self._ranks.broadcast_state(self._engine, self._progress)
        self._guard = Guard(self._run.config.guard, self._progress.norms)
        self._skipped = 0

    def _load_newest(self) -> None:
        progress, saver = self._progress, self._saver
        saver.wait()
        remedy = "lower train.lr, or check the data there"
        if saver.newest == 0:
            raise UserError(f"step {progress.step}: training diverged before the first checkpoint: {remedy}")
        newest = checkpoint.find(self._run.folder)
        for problem in newest.skipped:
            self._warn(f"{problem}: renamed to NAME.damaged")
        checkpoint.quarantine(self._run.folder, newest.step)  # the following saves are the newest steps
        saver.newest = newest.step
        restored = Progress.from_state(newest.state)
        restored.returns = 1 + (progress.returns if progress.returned_to == newest.step else 0)
        restored.returned_to = newest.step
        if restored.returns > MAX_ROLLBACKS:
            raise UserError(
                f"step {progress.step}: training diverged again after {MAX_ROLLBACKS} rollbacks to step {newest.step}: "
                f"{remedy}"
            )
        self._engine.load_state(checkpoint.load_arrays(newest, self._run.config.model, optimizer=True))
        text = (
            f"step {progress.step}: training diverged: rolled back to step {newest.step}, skipping the batches after it"
        )
        self._display.message(text)
        self._log_event("resume", newest.step, folder=str(newest.folder), reason=text)
        restored.position, restored.wall_seconds = progress.position, progress.wall_seconds
        restored.skipped_steps = progress.skipped_steps
        restored.best_val_loss, restored.best_val_bpb = progress.best_val_loss, progress.best_val_bpb
        vars(progress).update(vars(restored))

    def _shrink_micro_batch(self, step: int, error: MemoryError | GPUTimeoutError) -> None:
        """Called when memory runs out or macOS stops the GPU; the batch stays the same."""
        reason = str(error) if isinstance(error, GPUTimeoutError) else "out of memory"
        if self._rows == 1:
            if self._progress.step > self._saver.newest and not self._guard.last_step_was_bad:
                self._save()  # the failed step has not changed the weights
            self._wait_for_saves()
            if isinstance(error, GPUTimeoutError):
                raise GPUTimeoutError(f"step {step}: {reason}")
            raise UserError(
                f"step {step}: {reason} with train.micro_batch_size=1: set train.gradient_checkpointing: true, or "
                "reduce the model or data.seq_len"
            )
        self._rows, self._micro_batches = split_micro_batch(self._rows, self._micro_batches)
        self._eval_rows = min(self._eval_rows, self._rows)
        text = (
            f"step {step}: {reason}: continuing with train.micro_batch_size={self._rows} "
            f"train.grad_accum_steps={self._micro_batches} (same batch)"
        )
        self._display.message(text)
        self._log_event("warning", step, text=text)

    def _wait_for_saves(self) -> None:
        """Called before all ranks raise the same error, so that none exits before rank 0 has finished its last save."""
        self._saver.wait()
        self._ranks.any(False)

    def _state(self) -> dict[str, Any]:
        progress = self._progress.to_state(self._train.seed)
        return {**self._run.identity, **progress, "ranks": self._ranks.size, "config": self._run.config.model_dump()}

    def _save(self) -> None:
        self._saver.save(self._progress.step, self._engine.state(), self._state())

    def report_save(self, result: SaveResult) -> None:
        if result.written:
            name, seconds = checkpoint.step_folder(self._run.folder, result.step).name, round(result.seconds, 3)
            self._log_event("save", result.step, folder=name, removed=result.removed, seconds=seconds)
        if result.error is not None:
            text = (
                f"step {result.step}: {result.action} failed ({result.error}): training continues, existing "
                "checkpoints are kept, and it will be retried"
            )
            self._display.message(f"warning: {text}")
            self._log_event("warning", result.step, text=text)

    def _is_patience_exhausted(self) -> bool:
        return self._train.patience is not None and self._progress.stale >= self._train.patience

    def _is_validation_due(self) -> bool:
        step = self._progress.step
        return len(self._run.val) > 0 and (step % self._train.eval_interval == 0 or step == self._run.steps)

    def _validate(self, already_logged: bool = False) -> bool:
        """Validates, logs the result and updates the best step. Returns False if a stop request interrupted it."""
        run, progress = self._run, self._progress
        self._saver.wait()
        loss = self._validation_loss()
        if loss is None:
            return False
        values = {"val_loss": loss}
        if run.bytes_per_token is not None:
            values["val_bpb"] = loss / math.log(2) / run.bytes_per_token
            values["perplexity"] = math.exp(min(loss, 700.0))
        values |= run.val_metrics()
        self._update_best(loss, values.get("val_bpb"))
        if not already_logged:
            self._log_event("eval", progress.step, **values)
        shown = (
            f"{VAL_NAMES.get(name, name.removeprefix('val_').replace('_', ' '))} {x:.4f}" for name, x in values.items()
        )
        self._display.message(f"step {progress.step}: {', '.join(shown)}")
        if progress.record_val_loss(loss) and not already_logged:
            self._warn(
                f"overfitting: validation loss rose {OVERFITTING_RISES} times in a row while training loss fell: use "
                "more text or model.dropout; the best step is kept, and train.patience stops such a run"
            )
        if self._is_patience_exhausted():
            self._display.message(
                f"step {progress.step}: stopping early: no improvement in {progress.stale} validations (train.patience)"
            )
        return True

    def _validation_loss(self) -> float | None:
        """Returns the mean loss over the validation split, or None if a stop request interrupted it."""
        sums = np.zeros(2)
        for i in range(0, len(self._run.val), self._ranks.size):
            if self._ranks.any(self._stop.requested):
                return None
            local = i + self._ranks.rank
            result = self._evaluate(self._run.val[local]) if local < len(self._run.val) else np.zeros(2)
            for part in self._ranks.all_gather_scalars(result):
                sums += part  # in batch order: the sum does not depend on the number of ranks
        return float(sums[0] / sums[1])

    def _update_best(self, loss: float, bits_per_byte: float | None) -> None:
        progress, best = self._progress, self._progress.best_val_loss
        if not math.isfinite(loss) or (best is not None and loss >= best):
            progress.stale += 1
            return
        # Saved before `progress` changes, so that the checkpoint is the same in a run that resumes here; see `run`.
        if progress.step > 0 and not self._saver.is_submitted(progress.step) and not self._guard.last_step_was_bad:
            self._save()
        values = {"best_val_loss": loss, "best_val_bpb": bits_per_byte}
        if progress.step == 0 or self._ranks.broadcast_scalar(self._saver.mark_best(progress.step, values)):
            progress.best_val_loss, progress.best_val_bpb = loss, bits_per_byte
        progress.stale = 0

    def _evaluate(self, batch: Batch) -> npt.NDArray[np.float64]:
        """Returns summed loss and token count. If memory runs out or macOS stops the GPU, later micro-batches are
        smaller."""
        rows = batch.inputs.shape[1]
        while True:
            size = min(rows, self._eval_rows)
            try:
                parts = [self._engine.eval_step(batch.rows(i, i + size)) for i in range(0, rows, size)]
                sums: npt.NDArray[np.float64] = np.sum(parts, axis=0)
                return sums
            except (MemoryError, GPUTimeoutError) as error:
                if size == 1:
                    raise
                self._eval_rows = -(-size // 2)
                reason = str(error) if isinstance(error, GPUTimeoutError) else "out of memory"
                self._warn(f"validation: {reason}: continuing with a micro-batch size of {self._eval_rows}")

    def _log_event(self, event: str, step: int, **values: Any) -> None:
        if self._log is not None:
            self._log.event(event, step, **values)

    def _warn(self, text: str) -> None:
        self._display.message(f"warning: step {self._progress.step}: {text}")
        self._log_event("warning", self._progress.step, text=text)

    def _sample(self) -> None:
        if self._run.sample is None:
            return
        self._saver.wait()
        try:
            text = self._run.sample()
        except UserError as error:  # such as a prompt that is too long
            self._warn(f"sampling failed: {error}")
            return
        self._log_event("sample", self._progress.step, text=text)
        self._display.message(f"step {self._progress.step}: sample: {text}")
