"""The training loop, written once for every engine: steps, schedule, validation, checkpoints, samples, stopping, and
what is done when something goes wrong."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.data.batches import Batch, Prefetcher, ValBatches
from anarchobot.optim.schedule import learning_rate, muon_momentum
from anarchobot.runs import checkpoint
from anarchobot.runs.metrics_log import MetricsLog
from anarchobot.runs.progress import RISES, Progress
from anarchobot.runs.async_checkpointer import NullCheckpointer, SaveResult, AsyncCheckpointer
from anarchobot.training.engine import Engine, StepResult
from anarchobot.training.guard import Guard
from anarchobot.training.ranks import ALONE, Ranks
from anarchobot.training.signals import StopRequest

MOST_SKIPPED = 30  # steps in a row that are not finite: float16's loss scale gets from its highest to 1 in fewer
MOST_RETURNS = 3  # to the same checkpoint


class Display(Protocol):
    """What shows a run to a person."""

    def train(self, step: int, values: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Run:
    """What a run is made of. `identity` goes into every checkpoint and must be the same on resume; `problem` says what
    is found to be wrong with the shards, while they are checked beside the training; `judge` gives what a validation
    shall say besides; `rates`, what so many tokens a second come to. Of several `ranks`, `train` gives each its own
    part of a step, and rank 0 saves, logs and shows."""

    config: Config
    steps: int
    identity: dict[str, Any]
    train: Prefetcher
    val: ValBatches
    bytes_per_token: float | None  # of the validation split: nats per token into bits per byte; None: no such loss
    folder: Path
    sample: Callable[[], str] | None = None
    problem: Callable[[], str | None] = lambda: None
    judge: Callable[[], Mapping[str, float]] = dict
    rates: Callable[[float], Mapping[str, float]] = lambda tokens_per_second: {}
    ranks: Ranks = ALONE


def run_training(engine: Engine, run: Run, progress: Progress, log: MetricsLog, display: Display) -> bool:
    """Trains from `progress` to the last step; returns whether it got there (False: somebody asked it to stop).

    A fresh run begins with a validation, so that the curve has a start. At each step that calls for several things the
    checkpoint comes first, and is on the disk before the next begins: nothing that follows can cost it.
    """
    # A run that goes on from another folder's step has nothing of its own yet.
    newest = progress.step if progress.step in checkpoint.saved_steps(run.folder) else 0
    training = _Training(engine, run, progress, log, display)
    follows = run.ranks.rank > 0
    kind = NullCheckpointer if follows else AsyncCheckpointer
    with (
        StopRequest(quiet=follows) as stop,
        kind(run.folder, run.config.train, newest, training.saved) as saver,
        run.ranks,
    ):
        return training.go(stop, saver)


class _Training:
    def __init__(self, engine: Engine, run: Run, progress: Progress, log: MetricsLog, display: Display) -> None:
        self._engine, self._run, self._progress, self._log, self._display = engine, run, progress, log, display
        self._train = run.config.train
        self._ranks = run.ranks
        self._guard = Guard(run.config.guard, progress.norms)
        self._micro_batches, self._rows = self._train.grad_accum_steps, self._train.micro_batch_size
        self._eval_rows = self._rows
        self._began = time.monotonic() - progress.wall_seconds
        self._line_seconds, self._line_tokens = 0.0, 0  # since the last line; without validation and saving
        self._skipped = 0  # steps in a row

    def go(self, stop: StopRequest, saver: AsyncCheckpointer) -> bool:
        """Whether all is done, the last validation too."""
        self._stop, self._saver = stop, saver
        progress, train, due = self._progress, self._train, False
        # A checkpoint is older than its own step's validation: what it made known of the best is found out again.
        again = progress.step in self._log.steps_of("eval")
        validated = not self._validation_due() or self._validate(in_the_log=again)
        while progress.step < self._run.steps and not self._ranks.any(stop.requested or self._patience_is_out()):
            if problem := self._run.problem():
                saver.wait()
                raise UserError(f"{problem}; what was trained on it since step {saver.newest} is not saved")
            self._step()
            if self._guard.gives_up:
                self._go_back()
                continue
            due = due or saver.due(progress.step) or progress.step == self._run.steps or stop.requested
            if due and not self._guard.doubts:
                self._save()
                due = False
            validated = not self._validation_due() or self._validate()
            if train.sample_interval and progress.step % train.sample_interval == 0 and not stop.requested:
                self._sample()
            saver.poll()
        done = progress.step >= self._run.steps
        # In doubt, the steps behind the newest checkpoint are made again: bad weights must not push it out.
        if progress.step > saver.newest and (done or not self._guard.doubts):
            saver.finish(progress.step, self._engine.state, self._state())
        saver.finish_naming()
        return (done or self._patience_is_out()) and validated

    def _patience_is_out(self) -> bool:
        return self._train.patience is not None and self._progress.stale >= self._train.patience

    def _step(self) -> None:
        run, progress, train = self._run, self._progress, self._train
        step, began = progress.step + 1, time.monotonic()
        lr, momentum, limit = learning_rate(step, train, run.steps), muon_momentum(step, train), self._guard.limit
        while True:
            batch = run.train.at(progress.position, self._micro_batches, self._rows)
            try:
                result = self._engine.train_step(batch, step, lr, momentum, limit)
                break
            except MemoryError:
                self._halve(step)
        self._guard.saw(result.grad_norm, finite=result.finite, overflow=result.overflow)
        position, progress.step = progress.position, step
        tokens = self._ranks.size * batch.inputs.size
        progress.position += self._ranks.size * batch.inputs.shape[0] * batch.inputs.shape[1]
        progress.tokens += tokens
        progress.wall_seconds = time.monotonic() - self._began
        self._line_seconds += time.monotonic() - began
        self._line_tokens += tokens
        if result.applied:
            self._skipped = 0
            progress.trained(result.loss)
            if step % train.log_interval == 0 or step == run.steps:
                self._write_line(result, lr)
        else:
            self._skip(result, position, limit)

    def _skip(self, result: StepResult, position: int, limit: float) -> None:
        step = self._progress.step
        # The batch's id: its first window's number in the run, and how many there are.
        batch = {"first_window": position, "windows": self._progress.position - position}
        values = {"loss": repr(result.loss), "grad_norm": repr(result.grad_norm), **batch}
        self._log.event("skip", step, reason="spike" if result.finite else "not finite", **values)
        what = (
            f"gradient norm {result.grad_norm:.4g} is a spike (above {limit:.4g})"
            if result.finite
            else "loss or gradient is not finite"
        )
        self._display.note(f"step {step}: {what}: this update is left out")
        self._skipped = 0 if result.finite else self._skipped + 1
        if self._skipped == MOST_SKIPPED:
            self._all_saved()
            raise UserError(
                f"step {step}: {self._skipped} steps in a row had a loss or gradient that is not finite: lower "
                f"train.lr, or go on from an earlier step (the newest saved one is {self._saver.newest})"
            )

    def _go_back(self) -> None:
        """To the newest checkpoint's weights, but not to its place in the data: past the batches that went wrong."""
        if self._ranks.rank == 0:
            self._load_newest()
        self._ranks.broadcast_state(self._engine, self._progress)
        self._guard = Guard(self._run.config.guard, self._progress.norms)
        self._skipped = 0

    def _load_newest(self) -> None:
        progress, saver = self._progress, self._saver
        saver.wait()
        lower = "lower train.lr, or look at the data there"
        if saver.newest == 0:
            raise UserError(
                f"step {progress.step}: the numbers went wrong (not finite) before the first checkpoint: {lower}"
            )
        found = checkpoint.find(self._run.folder)
        saver.newest = found.step
        before = Progress.of(found.state)
        before.returns = 1 + (progress.returns if progress.returned_to == found.step else 0)
        before.returned_to = found.step
        if before.returns > MOST_RETURNS:
            raise UserError(
                f"step {progress.step}: the numbers went wrong (not finite) again, after {MOST_RETURNS} returns to "
                f"step {found.step}: {lower}"
            )
        self._engine.load_state(checkpoint.load_arrays(found, self._run.config.model, optimizer=True))
        text = (
            f"step {progress.step}: too many steps in a row were not finite: back to step {found.step}, past that data"
        )
        self._display.note(text)
        self._log.event("resume", found.step, folder=str(found.folder), reason=text)
        before.position, before.wall_seconds = progress.position, progress.wall_seconds
        before.best_val_loss, before.best_val_bpb = progress.best_val_loss, progress.best_val_bpb
        vars(progress).update(vars(before))

    def _halve(self, step: int) -> None:
        """Smaller micro-batches and more of them: the batch stays what it was."""
        if self._rows == 1:
            if self._progress.step > self._saver.newest and not self._guard.doubts:
                self._save()  # nothing has changed: these weights are good
            self._all_saved()
            raise UserError(
                f"step {step}: out of memory with one sequence at a time: set train.gradient_checkpointing: true, or "
                "make the model or data.seq_len smaller"
            )
        parts = next(n for n in range(2, self._rows + 1) if self._rows % n == 0)
        self._rows, self._micro_batches = self._rows // parts, self._micro_batches * parts
        self._eval_rows = min(self._eval_rows, self._rows)
        text = (
            f"step {step}: out of memory: going on with train.micro_batch_size={self._rows} "
            f"train.grad_accum_steps={self._micro_batches}, which is the same batch"
        )
        self._display.note(text)
        self._log.event("warning", step, text=text)

    def _all_saved(self) -> None:
        """Before an end that all ranks come to: none leaves before rank 0 has brought its last save to the disk."""
        self._saver.wait()
        self._ranks.any(False)

    def _write_line(self, result: StepResult, lr: float) -> None:
        tokens_per_second = round(self._line_tokens / max(1e-9, self._line_seconds), 1)
        values = {
            "loss": result.loss,
            "smooth_loss": self._progress.smooth_loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": self._progress.tokens,
            "tokens_per_second": tokens_per_second,
            **self._run.rates(tokens_per_second),
            "peak_memory_gb": round(self._engine.peak_memory_gb(), 4),
            **{name: round(gb, 4) for name, gb in self._engine.memory_gb().items()},
            **result.extra,
        }
        self._log.event("train", self._progress.step, **values)
        self._display.train(self._progress.step, values)
        self._line_seconds, self._line_tokens = 0.0, 0

    def _state(self) -> dict[str, Any]:
        own = self._progress.state(self._train.seed)
        return {**self._run.identity, **own, "ranks": self._ranks.size, "config": self._run.config.model_dump()}

    def _save(self) -> None:
        self._saver.save(self._progress.step, self._engine.state(), self._state())

    def saved(self, saved: SaveResult) -> None:
        """Says what became of a save."""
        if saved.written:
            folder = checkpoint.step_folder(self._run.folder, saved.step).name
            self._log.event("save", saved.step, folder=folder, removed=saved.removed, seconds=round(saved.seconds, 3))
        if saved.error is not None:
            text = (
                f"step {saved.step}: {saved.what} failed "
                f"({saved.error}): training goes on, the checkpoints before it stay, and it will be tried again"
            )
            self._display.note(f"warning: {text}")
            self._log.event("warning", saved.step, text=text)

    def _validation_due(self) -> bool:
        step = self._progress.step
        return len(self._run.val) > 0 and (step % self._train.eval_interval == 0 or step == self._run.steps)

    def _validate(self, in_the_log: bool = False) -> bool:
        """Validates, logs, and keeps the step when it is the best so far; False when a stop request ended it."""
        run, progress = self._run, self._progress
        self._saver.wait()
        sums = np.zeros(2)
        for i in range(0, len(run.val), self._ranks.size):
            if self._ranks.any(self._stop.requested):
                return False
            own = i + self._ranks.rank
            for part in self._ranks.all_gather_scalars(self._evaluated(run.val[own]) if own < len(run.val) else np.zeros(2)):
                sums += part  # in their order, whatever the number of ranks
        loss = float(sums[0] / sums[1])
        values = {"val_loss": loss}
        if run.bytes_per_token is not None:
            values["val_bpb"] = loss / math.log(2) / run.bytes_per_token
            values["perplexity"] = math.exp(min(loss, 700.0))
        values |= run.judge()
        best = progress.best_val_loss
        if math.isfinite(loss) and (best is None or loss < best):
            # First, while the state still says what it says in any run that comes here; see `go`.
            if progress.step > 0 and not self._saver.has(progress.step) and not self._guard.doubts:
                self._save()
            found = {"best_val_loss": loss, "best_val_bpb": values.get("val_bpb")}
            if progress.step == 0 or self._ranks.broadcast_scalar(self._saver.name_best(progress.step, found)):
                progress.best_val_loss, progress.best_val_bpb = loss, values.get("val_bpb")
            progress.stale = 0
        else:
            progress.stale += 1
        if not in_the_log:
            self._log.event("eval", progress.step, **values)
        named = {"val_loss": "validation loss", "val_bpb": "bits per byte"}
        said = (f"{named.get(name, name.removeprefix('val_').replace('_', ' '))} {x:.4f}" for name, x in values.items())
        self._display.note(f"step {progress.step}: {', '.join(said)}")
        if progress.validated(loss) and not in_the_log:
            self._warn(
                f"validation loss has risen {RISES} times in a row while training loss fell: the "
                "model learns its text by heart. More text or model.dropout helps; the best step is kept, and "
                "train.patience would end such a run"
            )
        if self._patience_is_out():
            self._display.note(
                f"step {progress.step}: no better validation in {progress.stale} (train.patience): the run ends"
            )
        return True

    def _evaluated(self, batch: Batch) -> npt.NDArray[np.float64]:
        """Summed loss and count, by as few rows at a time as memory asks for."""
        rows = batch.inputs.shape[1]
        while True:
            at_once = min(rows, self._eval_rows)
            try:
                parts = [self._engine.eval_step(batch.rows(i, i + at_once)) for i in range(0, rows, at_once)]
                sums: npt.NDArray[np.float64] = np.sum(parts, axis=0)
                return sums
            except MemoryError:
                if at_once == 1:
                    raise
                self._eval_rows = -(-at_once // 2)
                self._warn(f"out of memory in validation: going on with {self._eval_rows} sequences at a time")

    def _warn(self, text: str) -> None:
        self._display.note(f"warning: step {self._progress.step}: {text}")
        self._log.event("warning", self._progress.step, text=text)

    def _sample(self) -> None:
        if self._run.sample is None:
            return
        self._saver.wait()
        try:
            text = self._run.sample()
        except UserError as error:  # such as a prompt that is too long: no reason to end a run
            self._warn(f"no sample: {error}")
            return
        self._log.event("sample", self._progress.step, text=text)
        self._display.note(f"step {self._progress.step}: sample: {text}")
