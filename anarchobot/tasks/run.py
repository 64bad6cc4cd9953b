"""Executes a run once its data and engine are ready; shared by pretrain, sft and dpo."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config
from anarchobot.config.strict_yaml import dump
from anarchobot.config.validation import untrained_distances
from anarchobot.config.wording import count
from anarchobot.model.parameters import parameter_count
from anarchobot.runs import checkpoint
from anarchobot.runs.metrics_log import ENVIRONMENT, MetricsLog
from anarchobot.runs.progress import Progress
from anarchobot.runs.run_log import logs_dir
from anarchobot.runs.trackers import open_trackers
from anarchobot.storage.durable import write_atomic
from anarchobot.storage.lock import FolderLock
from anarchobot.system.machine import stay_awake
from anarchobot.system.packages import environment_info
from anarchobot.system.peak_flops import training_flops_per_token
from anarchobot.tasks.engines import EngineHandle
from anarchobot.tasks.resume import (
    ResumePoint,
    changed_settings,
    check_same_on_all_ranks,
    check_same_run,
    clean_up,
    restore,
)
from anarchobot.training.display import TerminalDisplay, duration
from anarchobot.training.engine import Engine
from anarchobot.training.loop import Run, run_training

# What to print on stderr. brief: progress, notes and warnings, but no description of the run; json: the log's lines as
# they are written.
OutputMode = Literal["progress", "brief", "json", "nothing"]


def execute_run(
    run: Run,
    start: ResumePoint,
    handle: EngineHandle,
    *,
    before_training: Callable[[Path], object],
    description: Sequence[str],
    notes: Sequence[str] = (),
    trained_parameters: int,
    show: OutputMode,
    on_every_rank: Callable[[Path], object] = lambda folder: None,
) -> dict[str, Any]:
    """Trains and returns the summary, which is also written to the logs; `finished` is False if the run was stopped.

    For a new run, the engine holds the initial weights. `before_training` is called with the run folder once it is
    locked, on rank 0, and then `on_every_rank` on all ranks. `description` (of model and run) and `notes` (warnings,
    and what was left out of the data) are shown at the start and stored in environment.json. Ranks other than 0 write
    nothing and return only `finished` and `rank`.

    Raises UserError if the checkpoint does not match the config, another process writes to the folder, or the ranks
    differ.
    """
    engine, config, saved = handle.engine, run.config, start.checkpoint
    if saved is not None:
        check_same_run(saved, config, run.identity)
    check_same_on_all_ranks(run)
    if run.ranks.rank > 0:
        on_every_rank(run.folder)
        with run.train, TerminalDisplay(0, 0, quiet=True) as display:
            return {"finished": _train(engine, run, Progress(), None, display), "rank": run.ranks.rank}
    with FolderLock(run.folder):
        if sorted(checkpoint.saved_steps(run.folder)) != sorted(start.steps):
            raise UserError(f"{run.folder}: another run wrote to this folder in the meantime: retry")
        messages = clean_up(run.folder, saved)
        before_training(run.folder)
        on_every_rank(run.folder)
        progress = Progress(position=config.train.first_sequence)
        if saved is not None:
            run, progress = restore(engine, run, saved)
            if progress.step > run.steps:
                messages.append(
                    f"warning: nothing to do: the run is at step {progress.step}, past its length of {run.steps} steps "
                    "(train.total_steps, epochs, token_budget)"
                )
        settings = dump(config.model_dump())
        if progress.step <= run.steps:
            write_atomic(run.folder / "config.yaml", settings)
        run = replace(run, throughput=_throughput(config, handle.peak_tflops and run.ranks.size * handle.peak_tflops))
        logs = logs_dir(run.folder, config.train.log_path)
        trackers, tracker_messages = open_trackers(config.train.log_to, logs, run.folder.name, config.model_dump())
        display = TerminalDisplay(run.steps, progress.step, quiet=show not in ("progress", "brief"))
        log = MetricsLog(
            logs,
            echo=sys.stderr if show == "json" else None,
            tensorboard="tensorboard" in config.train.log_to,
            trackers=trackers,
            warn=lambda text: display.message(f"warning: {text}"),
        )
        with run.train, display, log:
            known = _made_of(log.folder) if saved is not None else []
            about = [line for line in description if show != "brief" or line.startswith("warning:")]
            for line in [*messages, *(line for line in [*about, *notes] if line not in known), *tracker_messages]:
                display.message(line)
            awake = stay_awake()
            if awake and show != "brief":
                display.message(awake)
            log.config(progress.step, settings)
            if saved is not None:
                changed = _log_resume(run, saved, progress, log)
                if show != "brief":
                    display.message(f"resuming from {saved.folder} at step {saved.step}{changed}")
            environment = {**environment_info(handle.device), "steps": run.steps, "made of": [*description, *notes]}
            write_atomic(log.folder / ENVIRONMENT, json.dumps(environment, indent=1) + "\n")
            for text in (*handle.warnings, *_warnings(run, trained_parameters)):
                display.message(f"warning: {text}")
                log.event("warning", progress.step, text=text)
            finished = _train(engine, run, progress, log, display)
            summary = _summary(run, progress, engine, finished)
            if (skipped := describe_skipped(summary)) and show != "brief":
                display.message(skipped)
            log.event("end", progress.step, finished=finished)
            log.summary(summary)
            if log.lost:
                display.message(f"warning: {log.lost} events could not be written to {log.folder}/metrics.jsonl")
    return summary


def describe_skipped(summary: Mapping[str, Any]) -> str:
    """Empty if no update was skipped."""
    if not summary["skipped_steps"]:
        return ""
    skipped = f"{summary['skipped_steps']:,} of {count(summary['steps'], 'update')} skipped"
    return f"{skipped}: gradients far above the mean or not finite (listed in metrics.jsonl; a few are normal)"


def _made_of(logs: Path) -> list[str]:
    """The description of the run when it was last started; empty if it can't be read."""
    try:
        return list(json.loads((logs / ENVIRONMENT).read_text(encoding="utf-8"))["made of"])
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _train(engine: Engine, run: Run, progress: Progress, log: MetricsLog | None, display: TerminalDisplay) -> bool:
    """Starts all ranks from rank 0's state and length."""
    run.ranks.broadcast_state(engine, progress)
    run = replace(run, steps=int(run.ranks.broadcast_scalar(run.steps)))
    return run_training(engine, run, progress, log, display)


def _log_resume(run: Run, saved: checkpoint.Checkpoint, progress: Progress, log: MetricsLog) -> str:
    """Returns a line about changed settings, or an empty string."""
    changed = {key: list(values) for key, values in changed_settings(saved.config, run.config).items()}
    if (ranks := saved.state.get("ranks", 1)) != run.ranks.size:
        changed["ranks"] = [ranks, run.ranks.size]
    log.event("resume", progress.step, folder=str(saved.folder), changed=changed)
    lines = ", ".join(f"{key} from {old} to {new}" for key, (old, new) in changed.items())
    return f"\nchanged: {lines}" if lines else ""


def _throughput(config: Config, peak: float | None) -> Callable[[float], Mapping[str, float]]:
    """Returns a function from tokens per second to TFLOP/s and their share of `peak`. It gives nothing for adapters and
    partly trained models, whose FLOPs depend on which layers are trained."""
    if config.lora.r is not None or config.train.trainable != "all":
        return lambda tokens_per_second: {}
    tflop_per_token = training_flops_per_token(config.model, config.data.seq_len) / 1e12

    def throughput(tokens_per_second: float) -> Mapping[str, float]:
        tflops = tokens_per_second * tflop_per_token
        return {"tflops": round(tflops, 5)} | ({"peak_share": round(tflops / peak, 5)} if peak else {})

    return throughput


def _warnings(run: Run, trained_parameters: int) -> Iterator[str]:
    train = run.config.train
    if train.warmup_steps >= run.steps:
        yield (
            f"train.warmup_steps ({train.warmup_steps}) is not below total_steps ({run.steps}): lr never reaches its "
            "peak"
        )
    if text := untrained_distances(run.config):
        yield text
    if len(run.val) == 0:
        yield "the validation split is empty: no validation and no best checkpoint (see data.val_fraction)"
    # Weights and AdamW's two moments in float32 (Muon has one); the best checkpoint, and the one being written.
    needed, free = (train.ckpt_keep + 2) * 12 * trained_parameters, shutil.disk_usage(run.folder).free
    if free < needed:
        yield (
            f"{run.folder}: {free / 1e9:.1f} GB free, but checkpoints will take up to {needed / 1e9:.1f} GB: free some "
            "space, or reduce train.ckpt_keep"
        )


def _summary(run: Run, progress: Progress, engine: Engine, finished: bool) -> dict[str, Any]:
    best = checkpoint.read_best(run.folder, progress.step)
    return {
        "finished": finished,
        "steps": progress.step,
        "tokens": progress.tokens,
        "parameters": parameter_count(run.config.model),
        "final_loss": progress.loss,
        "best_val_loss": progress.best_val_loss,
        "best_val_bpb": progress.best_val_bpb,
        "best_step": best and best["step"],
        "skipped_steps": progress.skipped_steps,
        "wall_seconds": round(progress.wall_seconds, 3),
        "wall_time": duration(progress.wall_seconds),
        "tokens_per_second": round(progress.tokens / max(1e-9, progress.wall_seconds), 1),
        "peak_memory_gb": round(engine.peak_memory_gb(), 4),
        "save_dir": str(run.folder),
    }
