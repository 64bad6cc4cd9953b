"""A run from its start to its summary: what all tasks have in common, once they have data and engine."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.yaml_tree import dump
from anarchobot.model.shapes import parameter_count
from anarchobot.storage.durable import write_whole
from anarchobot.storage.lock import FolderLock
from anarchobot.system.environment import environment
from anarchobot.tasks.engines import OpenEngine
from anarchobot.tasks.resuming import changes, check_same_run, checkpoint_to_resume, resume, room_for, tidy
from anarchobot.training import checkpoint
from anarchobot.training.display import TerminalDisplay, duration
from anarchobot.training.loop import Engine, Run, run_training
from anarchobot.training.metrics import MetricsLog
from anarchobot.training.progress import Progress


class Start(NamedTuple):
    """`steps` are those that the run's folder held when the program began; `checkpoint` is where the run goes on, None
    when it begins anew."""

    folder: Path
    steps: list[int]
    checkpoint: checkpoint.Checkpoint | None


def where_to_start(loaded: LoadedConfig) -> Start:
    """Raises UserError when the folder holds another run, or no checkpoint where one was named."""
    folder = Path(loaded.config.train.save_dir)
    steps = checkpoint.saved_steps(folder)
    return Start(folder, steps, checkpoint_to_resume(loaded, folder))


def carry_out(
    run: Run,
    start: Start,
    opened: OpenEngine,
    *,
    beside: Callable[[Path], object],
    opening: Sequence[str],
    trained: int,
    quiet: bool,
) -> dict[str, Any]:
    """Trains and returns the summary that it also writes; `finished` is False when it was stopped.

    The engine has the weights that a new run begins with. `beside` writes into the folder, once it is locked, what
    belongs beside the checkpoints, and may still use those. `opening` are lines for a person; `trained` counts
    parameters.

    Raises UserError when checkpoint and config do not belong together, or another run writes the folder.
    """
    engine, config, found = opened.engine, run.config, start.checkpoint
    if found is not None:
        check_same_run(found, run)
    with FolderLock(run.folder):
        if sorted(checkpoint.saved_steps(run.folder)) != sorted(start.steps):
            raise UserError(f"{run.folder}: another run has written here just now: begin again")
        told = tidy(run.folder, found)
        beside(run.folder)
        progress = Progress(position=config.train.first_sequence)
        if found is not None:
            progress = resume(engine, config, found)
            run = replace(run, steps=_steps_left(run, found, progress))
        write_whole(run.folder / "config.yaml", dump(config.model_dump()))
        with (
            run.train,
            MetricsLog(Path(config.train.log_path or run.folder / "logs")) as log,
            TerminalDisplay(run.steps, progress.step, quiet) as display,
        ):
            resuming = [f"resuming from {found.folder} at step {found.step}"] if found is not None else []
            for line in [*told, *opening, *resuming]:
                display.note(line)
            if found is not None:
                changed = {key: list(values) for key, values in changes(found.config, config).items()}
                for key, (old, new) in changed.items():
                    display.note(f"changed: {key} was {old}, is now {new}")
                log.event("resume", progress.step, folder=str(found.folder), changed=changed)
            write_whole(log.folder / "environment.json", json.dumps(environment(opened.place), indent=1) + "\n")
            for text in (*opened.warnings, *_warnings(run, trained)):
                display.note(f"warning: {text}")
                log.event("warning", progress.step, text=text)
            finished = run_training(engine, run, progress, log, display)
            summary = _summary(run, progress, engine, finished)
            log.event("end", progress.step, finished=finished)
            log.summary(summary)
            if log.lost:
                display.note(f"warning: {log.lost} lines of {log.folder}/metrics.jsonl could not be written")
    return summary


def _steps_left(run: Run, found: checkpoint.Checkpoint, progress: Progress) -> int:
    """The run's length: with other batches than before, a length that was given in data is that of the data left."""
    train = run.config.train
    before, now = (c.train.micro_batch_size * c.train.grad_accum_steps for c in (found.config, run.config))
    if before == now or (train.epochs is None and train.token_budget is None):
        return run.steps
    wanted = (train.token_budget or 0) / run.train.at(0, 1, 1).inputs.size  # in sequences, or pairs
    wanted = wanted if train.epochs is None else train.epochs * run.train.windows
    wanted += train.first_sequence
    return progress.step + max(0, math.ceil((wanted - progress.position) / now))


def _warnings(run: Run, trained: int) -> Iterator[str]:
    warmup = run.config.train.warmup_steps
    if warmup >= run.steps:
        yield f"warmup_steps ({warmup}) is no less than the run's {run.steps} steps: lr never reaches its peak"
    if len(run.val) == 0:
        yield "the validation split is empty: no validation, no best checkpoint (see data.val_fraction)"
    # Two moments for each parameter is AdamW's; Muon has one and a little.
    if text := room_for(run.folder, trained, 2 * trained, run.config.train.ckpt_keep):
        yield text


def _summary(run: Run, progress: Progress, engine: Engine, finished: bool) -> dict[str, Any]:
    return {
        "finished": finished,
        "steps": progress.step,
        "tokens": progress.tokens,
        "parameters": parameter_count(run.config.model),
        "final_loss": progress.loss,
        "best_val_loss": progress.best_val_loss,
        "best_val_bpb": progress.best_val_bpb,
        "best_step": checkpoint.named_step(run.folder / "best.json"),
        "wall_seconds": round(progress.wall_seconds, 3),
        "wall_time": duration(progress.wall_seconds),
        "tokens_per_second": round(progress.tokens / max(1e-9, progress.wall_seconds), 1),
        "peak_memory_gb": round(engine.peak_memory_gb(), 4),
        "save_dir": str(run.folder),
    }
