"""A small parent that watches over a run and resumes it when it dies.

On a Mac, running out of memory is an abort that no program can catch; elsewhere the system kills. The parent imports no
MLX and holds no model, so what kills the run spares it.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from anarchobot.config.schema import Config
from anarchobot.data.shards import read_manifest
from anarchobot.model.llama.flops import model_step
from anarchobot.optim.schedule import total_steps
from anarchobot.runs.checkpoint import saved_steps
from anarchobot.training.ranks import detect_launcher
from anarchobot.training.signals import PARENT, can_handle

MOST_RESUMES = 3  # behind one checkpoint, before the micro-batch is made smaller
HOUR = 3600.0
# Operations a second, for a guess at how long a run will take: a small Mac's GPU, and two cores.
GPU_RATE, CPU_RATE = 2e12, 1e11
BYTES_A_TOKEN, HUB_TOKENS = 4, 10**8
_FORWARDED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def wanted(config: Config, *, tuning: bool = False) -> bool:
    """train.supervise; where it is left out, whether the run will by a rough guess take more than an hour. `tuning`:
    its data are conversations, not shards. Not for one of several ranks: it can't be resumed alone."""
    if os.environ.get(PARENT) or detect_launcher():
        return False
    if config.train.supervise is not None:
        return config.train.supervise
    return estimate_seconds(config, tuning=tuning) > HOUR


def estimate_seconds(config: Config, *, tuning: bool = False) -> float:
    """From the operations of the steps and an assumed speed. Raises UserError when there are no shards."""
    train, seq_len = config.train, config.data.seq_len
    windows = (_tokens_of_files(config) if tuning else _tokens_of_shards(config)) // seq_len
    step = train.grad_accum_steps * model_step(config.model, train.micro_batch_size, [(0, seq_len)])
    on_gpu = train.device != "cpu" and sys.platform == "darwin"
    return total_steps(train, seq_len, windows) * step / (GPU_RATE if on_gpu else CPU_RATE)


def _tokens_of_shards(config: Config) -> int:
    folders = [config.data.shard_dir] if isinstance(config.data.shard_dir, str) else config.data.shard_dir
    return sum(read_manifest(folder).tokens("train") for folder in folders)


def _tokens_of_files(config: Config) -> int:
    """By their bytes; a dataset that is no file here is taken to be large."""
    names = config.data.dataset or []
    paths = [Path(name) for name in ([names] if isinstance(names, str) else names)]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size // BYTES_A_TOKEN if file.is_file() else HUB_TOKENS for file in files)


def supervise(command: Sequence[str], run_folder: Path, micro_batch_size: int, grad_accum_steps: int) -> int:
    """Runs `command`, an `anarchobot pretrain ...`, and again with --resume-from auto when a signal ended it; returns
    its exit code, or 1 when it is given up.

    Behind one checkpoint it is resumed three times, then with smaller micro-batches and more of them, down to one
    sequence. Signals are passed on.
    """
    resumes, newest = 0, -1
    rows, micro_batches = micro_batch_size, grad_accum_steps
    extra: list[str] = []
    while True:
        code, told_to_stop = _run([*command, *extra])
        if code >= 0:
            return code
        if told_to_stop:  # before it could answer
            return 130
        name = signal.Signals(-code).name
        step = max(saved_steps(run_folder), default=0)
        resumes = resumes + 1 if step == newest else 1
        newest = step
        if resumes > MOST_RESUMES:
            if rows == 1:
                _say(
                    f"the run was ended by {name} again and again behind step {step}, at last with one sequence at a "
                    "time: make the model or data.seq_len smaller, or close other programs"
                )
                return 1
            parts = next(n for n in range(2, rows + 1) if rows % n == 0)
            rows, micro_batches = rows // parts, micro_batches * parts
        extra, how = [], ""
        if rows < micro_batch_size:
            extra = [f"train.grad_accum_steps={micro_batches}", "--batch-size", str(rows)]
            how = f", with train.micro_batch_size={rows} train.grad_accum_steps={micro_batches}"
        if step:
            extra += ["--resume-from", "auto"]
        _say(f"the run was ended by {name}: going on from step {step}{how}")


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """The command's exit code, negative when a signal ended it, and whether one was passed on to it.

    It has a session of its own, so that a Ctrl-C reaches it once, from here.
    """
    child = subprocess.Popen(command, env={**os.environ, PARENT: str(os.getpid())}, start_new_session=True)

    passed_on: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        passed_on.append(number)
        child.send_signal(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, forward) for number in _FORWARDED if can_handle(number)}
    try:
        return child.wait(), bool(passed_on)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    with suppress(OSError):  # the terminal may have gone
        print(f"anarchobot: {text}", file=sys.stderr, flush=True)
