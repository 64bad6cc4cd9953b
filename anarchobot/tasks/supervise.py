"""A small parent process that resumes a training run when it crashes.

On a Mac, running out of memory aborts the process and can't be caught; elsewhere the system kills it. The parent
imports no MLX and holds no model, so it survives what kills the run.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from anarchobot.config.schema import Config, TrainConfig
from anarchobot.data.shards import read_manifest
from anarchobot.model.parameters import model_flops
from anarchobot.optim.schedule import split_micro_batch, total_steps
from anarchobot.runs.checkpoint import saved_steps
from anarchobot.training.ranks import detect_launcher
from anarchobot.training.signals import PARENT_ENV, forward_signals, print_status

MAX_RESUMES = 3  # from the same checkpoint, before the micro-batch size is reduced
MIN_SECONDS = 3600.0  # estimated duration from which runs are supervised by default
GPU_RATE, CPU_RATE = 2e12, 1e11  # FLOP/s assumed for the estimate: a small Mac's GPU, two CPU cores
BYTES_PER_TOKEN, HUB_TOKENS = 4, 10**8


def should_supervise(config: Config, *, tuning: bool = False) -> bool:
    """Returns train.supervise; by default, whether the run is estimated to take over an hour. `tuning`: the data are
    conversations, not shards. Always false for one of several ranks, which can't be resumed alone."""
    if os.environ.get(PARENT_ENV) or detect_launcher():
        return False
    if config.train.supervise is not None:
        return config.train.supervise
    return estimate_seconds(config, tuning=tuning) > MIN_SECONDS


def estimate_seconds(config: Config, *, tuning: bool = False) -> float:
    """Estimates the run's duration from its FLOPs and an assumed speed. Raises UserError if there are no shards."""
    train, seq_len = config.train, config.data.seq_len
    windows = (_tokens_in_files(config) if tuning else _tokens_in_shards(config)) // seq_len
    step = train.grad_accum_steps * model_flops(config.model, train.micro_batch_size, [(0, seq_len)])
    on_gpu = train.device != "cpu" and sys.platform == "darwin"
    return total_steps(train, seq_len, windows) * step / (GPU_RATE if on_gpu else CPU_RATE)


def _tokens_in_shards(config: Config) -> int:
    return sum(read_manifest(folder).tokens("train") for folder in config.data.shard_dirs)


def _tokens_in_files(config: Config) -> int:
    """Estimates tokens from file sizes; a Hugging Face dataset counts as HUB_TOKENS."""
    paths = [Path(name) for name in config.data.datasets]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size // BYTES_PER_TOKEN if file.is_file() else HUB_TOKENS for file in files)


def supervise(command: Sequence[str], train: TrainConfig) -> int:
    """Runs `command`, an `anarchobot pretrain ...` with the settings `train`, and resumes it whenever a signal killed
    it. Returns its exit code, or 1 after giving up.

    After MAX_RESUMES resumes from the same checkpoint, the micro-batch size is reduced at every further resume, down to
    one sequence; the batch and the validation set stay the same. Signals are forwarded.
    """
    resumes, newest = 0, -1
    rows, micro_batches = train.micro_batch_size, train.grad_accum_steps
    extra: list[str] = []
    while True:
        code, stop_requested = _run([*command, *extra])
        if code >= 0:
            return code
        if stop_requested:  # the signal came before the child could handle it
            return 130
        name = signal.Signals(-code).name
        step = max(saved_steps(Path(train.save_dir)), default=0)
        resumes = resumes + 1 if step == newest else 1
        newest = step
        if resumes > MAX_RESUMES:
            if rows == 1:
                print_status(
                    f"giving up: the run was killed by {name} repeatedly after step {step}, even with "
                    "train.micro_batch_size=1: reduce the model or data.seq_len, or close other programs"
                )
                return 1
            rows, micro_batches = split_micro_batch(rows, micro_batches)
        extra, settings = [], ""
        if rows < train.micro_batch_size:
            extra = [f"train.grad_accum_steps={micro_batches}", "--batch-size", str(rows)]
            if train.eval_batches is not None and not step:  # a resumed run keeps its validation set
                extra.append(f"train.eval_batches={train.eval_batches * train.micro_batch_size // rows}")
            settings = f" with train.micro_batch_size={rows} train.grad_accum_steps={micro_batches}"
        if step:
            extra += ["--resume-from", "auto"]
        print_status(f"the run was killed by {name}: resuming from step {step}{settings}")


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """Returns the exit code (negative if killed by a signal) and whether a signal was forwarded.

    The child has a separate session, so that a Ctrl-C reaches it only once, through this process.
    """
    child = subprocess.Popen(command, env={**os.environ, PARENT_ENV: str(os.getpid())}, start_new_session=True)
    with forward_signals([child]) as forwarded:
        return child.wait(), bool(forwarded)
