"""A run from its start to its summary: what all tasks have in common, once they have data and engine."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anarchobot.config.errors import UserError
from anarchobot.config.loading import LoadedConfig
from anarchobot.config.schema import Config
from anarchobot.config.strict_yaml import dump
from anarchobot.model.parameters import parameter_count
from anarchobot.runs import checkpoint
from anarchobot.runs.metrics_log import MetricsLog, NullMetricsLog
from anarchobot.runs.progress import Progress
from anarchobot.storage.durable import write_atomic
from anarchobot.storage.lock import FolderLock
from anarchobot.system.machine import stay_awake
from anarchobot.system.micro_batch import ResolvedConfig, resolve_micro_batch
from anarchobot.system.packages import environment_info
from anarchobot.system.peak_flops import training_flops_per_token
from anarchobot.tasks.engines import OpenEngine
from anarchobot.tasks.resume import (
    changes,
    check_same_on_all_ranks,
    check_same_run,
    checkpoint_to_resume,
    resume,
    room_for,
    tidy,
)
from anarchobot.training.display import TerminalDisplay, duration
from anarchobot.training.engine import Engine
from anarchobot.training.loop import Display, Run, run_training
from anarchobot.training.ranks import ALONE, Ranks, detect_launcher

Show = Literal["progress", "json", "nothing"]  # on stderr: for a person, or the log's lines as they are written


class Start(NamedTuple):
    """`steps` are those that the run's folder held when the program began; `checkpoint` is where the run goes on, None
    when it begins anew."""

    folder: Path
    steps: list[int]
    checkpoint: checkpoint.Checkpoint | None


def resolve_run(loaded: LoadedConfig) -> ResolvedConfig:
    """`resolve_micro_batch`, for one that may be one of several ranks, each of which must choose the same."""
    train = loaded.config.train
    if train.automatic and train.memory_budget_gb is None and detect_launcher() is not None:
        raise UserError(
            f"{loaded.where('train.micro_batch_size')}: auto, on several ranks: set train.memory_budget_gb, which each "
            "of them may take"
        )
    return resolve_micro_batch(loaded)


def find_start(loaded: LoadedConfig, ranks: Ranks = ALONE) -> Start:
    """Only rank 0 looks; the others follow it. Raises UserError when the folder holds another run, or no checkpoint
    where one was named."""
    folder = Path(loaded.config.train.save_dir)
    if ranks.rank > 0:
        return Start(folder, [], None)
    steps = checkpoint.saved_steps(folder)
    return Start(folder, steps, checkpoint_to_resume(loaded, folder))


def execute_run(
    run: Run,
    start: Start,
    opened: OpenEngine,
    *,
    beside: Callable[[Path], object],
    opening: Sequence[str],
    trained: int,
    show: Show,
) -> dict[str, Any]:
    """Trains and returns the summary that it also writes; `finished` is False when it was stopped.

    The engine has the weights that a new run begins with. `beside` writes into the folder, once it is locked, what
    belongs beside the checkpoints, and may still use those. `opening` are lines for a person; `trained` counts
    parameters. A rank beside the first writes nothing, and its summary only says that it was one.

    Raises UserError when checkpoint and config do not belong together, another run writes the folder, or the ranks
    are not alike.
    """
    engine, config, found = opened.engine, run.config, start.checkpoint
    if found is not None:
        check_same_run(found, config, run.identity)
    check_same_on_all_ranks(run)
    if run.ranks.rank > 0:
        with run.train, NullMetricsLog() as no_log, TerminalDisplay(0, 0, quiet=True) as display:
            return {"finished": _train(engine, run, Progress(), no_log, display), "rank": run.ranks.rank}
    with FolderLock(run.folder):
        if sorted(checkpoint.saved_steps(run.folder)) != sorted(start.steps):
            raise UserError(f"{run.folder}: another run has written here just now: begin again")
        told = tidy(run.folder, found)
        beside(run.folder)
        progress = Progress(position=config.train.first_sequence)
        if found is not None:
            progress = resume(engine, config, found)
            run = replace(run, steps=_steps_left(run, found, progress))
            if progress.step > run.steps:
                told.append(
                    f"warning: the run is at step {progress.step} already, beyond the {run.steps} asked for: nothing "
                    "is left to do (train.total_steps, epochs, token_budget)"
                )
            _remember_the_best(run, progress)
        settings = dump(config.model_dump())
        if progress.step <= run.steps:
            write_atomic(run.folder / "config.yaml", settings)
        run = replace(run, rates=_rates(config, opened.peak_tflops and run.ranks.size * opened.peak_tflops))
        echo = sys.stderr if show == "json" else None
        with (
            run.train,
            MetricsLog(Path(config.train.log_path or run.folder / "logs"), echo) as log,
            TerminalDisplay(run.steps, progress.step, quiet=show != "progress") as display,
        ):
            resuming = [f"resuming from {found.folder} at step {found.step}"] if found is not None else []
            awake = stay_awake()
            for line in [*told, *opening, *resuming, *([awake] if awake else [])]:
                display.note(line)
            log.config(progress.step, settings)
            if found is not None:
                changed = {key: list(values) for key, values in changes(found.config, config).items()}
                if (ranks := found.state.get("ranks", 1)) != run.ranks.size:
                    changed["ranks"] = [ranks, run.ranks.size]
                for key, (old, new) in changed.items():
                    display.note(f"changed: {key} was {old}, is now {new}")
                log.event("resume", progress.step, folder=str(found.folder), changed=changed)
            made = {**environment_info(opened.place), "made of": list(opening)}
            write_atomic(log.folder / "environment.json", json.dumps(made, indent=1) + "\n")
            for text in (*opened.warnings, *_warnings(run, trained)):
                display.note(f"warning: {text}")
                log.event("warning", progress.step, text=text)
            finished = _train(engine, run, progress, log, display)
            summary = _summary(run, progress, engine, finished)
            log.event("end", progress.step, finished=finished)
            log.summary(summary)
            if log.lost:
                display.note(f"warning: {log.lost} lines of {log.folder}/metrics.jsonl could not be written")
    return summary


def _train(engine: Engine, run: Run, progress: Progress, log: MetricsLog, display: Display) -> bool:
    """From where rank 0 stands, to the last of its steps."""
    run.ranks.broadcast_state(engine, progress)
    return run_training(engine, replace(run, steps=int(run.ranks.broadcast_scalar(run.steps))), progress, log, display)


def _steps_left(run: Run, found: checkpoint.Checkpoint, progress: Progress) -> int:
    """The run's length: with other batches than before, a length that was given in data is that of the data left."""
    train = run.config.train
    before, now = (
        ranks * c.train.micro_batch_size * c.train.grad_accum_steps
        for c, ranks in ((found.config, found.state.get("ranks", 1)), (run.config, run.ranks.size))
    )
    if before == now or (train.epochs is None and train.token_budget is None):
        return run.steps
    wanted = (train.token_budget or 0) / run.train.at(0, 1, 1).inputs.size  # in sequences, or pairs
    wanted = wanted if train.epochs is None else train.epochs * run.train.windows
    wanted += train.first_sequence
    return progress.step + max(0, math.ceil((wanted - progress.position) / now))


def _remember_the_best(run: Run, progress: Progress) -> None:
    """A checkpoint is older than its own step's validation. Where that is not made again, best.json knows of it."""
    due = progress.step % run.config.train.eval_interval == 0 or progress.step == run.steps
    best = None if due else checkpoint.read_best(run.folder, progress.step)
    if best is not None and (progress.best_val_loss is None or best["best_val_loss"] < progress.best_val_loss):
        progress.best_val_loss, progress.best_val_bpb = best["best_val_loss"], best.get("best_val_bpb")
        progress.stale = 0


def _rates(config: Config, peak: float | None) -> Callable[[float], Mapping[str, float]]:
    """10^12 operations a second that the model needs, and their share of what the device could do at most. Adapters
    need less, by an amount that depends on where they are: nothing is said of those."""
    if config.lora.r is not None or config.train.trainable != "all":
        return lambda tokens_per_second: {}
    operations = training_flops_per_token(config.model, config.data.seq_len) / 1e12

    def rates(tokens_per_second: float) -> Mapping[str, float]:
        tflops = tokens_per_second * operations
        return {"tflops": round(tflops, 5)} | ({"peak_share": round(tflops / peak, 5)} if peak else {})

    return rates


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
