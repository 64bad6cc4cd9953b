"""`anarchobot selftest`: fault injection. Runs are killed, interrupted, corrupted, or hit by disk errors.

A tiny model trains on a page of the built-in text, once without faults, then once per fault. Every interrupted run is
resumed and must end with the same bytes as the uninterrupted run.
"""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.config.strict_yaml import dump
from anarchobot.data.pretokenize import Pretokenizer
from anarchobot.data.shards import verify
from anarchobot.data.sources import builtin
from anarchobot.data.sources.documents import Document
from anarchobot.model.parameters import init_parameters
from anarchobot.runs import checkpoint
from anarchobot.storage import durable
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

STEPS = 20
MAX_ATTEMPTS = 8  # to interrupt a run before it ends
VOCAB = 384
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {"vocab_size": VOCAB, "n_layers": 2, "d_model": 32, "n_heads": 2, "max_seq_len": 32, "dropout": 0.1},
    "data": {"seq_len": 32},
    "train": {
        "total_steps": STEPS, "micro_batch_size": 2, "grad_accum_steps": 2, "lr": 0.01, "warmup_steps": 2,
        "log_interval": 5, "eval_interval": 10, "eval_batches": 2, "ckpt_interval": 2, "ckpt_keep": 2,
        "device": "cpu", "cpu_threads": 1, "precision": "float32", "supervise": False,
    },
}  # fmt: skip
COMPARED = ("step", "tokens", "data_position", "loss", "norms", "sha256", "best_val_loss")  # keys of state.json

DISK_MODEL = ModelConfig(vocab_size=16, n_layers=1, d_model=8, n_heads=1)
KILL = 9  # instead of an errno: exit as after kill -9
MAX_OPERATIONS = 1000  # of a save; far more than there are


@dataclass
class FaultResult:
    """The result of one kind of fault: `tried` cases, one line per failure, and an optional note."""

    fault: str
    tried: int
    failures: list[str]
    note: str = ""


def run_selftest(folder: Path, kills: int, seed: int) -> Iterator[FaultResult]:
    """Tests every kind of fault in an empty `folder`; `kills` runs are killed, a fifth as many are interrupted."""
    harness = FaultHarness(folder, seed)
    yield harness.kill_runs(kills)
    yield harness.interrupt_runs(max(2, kills // 5))
    yield harness.flip_bytes(200)
    yield harness.truncate_files(50)
    for name, error in (("a full disk", errno.ENOSPC), ("an I/O error", errno.EIO), ("kill -9", KILL)):
        yield fail_each_operation(folder / "disk", name, error)


class FaultHarness:
    """A folder with shards, a configuration and the uninterrupted reference run."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self._random = folder, random.Random(seed)  # noqa: S311
        texts = list(islice(builtin.topics(), 12))
        (folder / "shards").mkdir(parents=True)
        tokenizer = load_tokenizer(train_tokenizer(texts, folder / "shards" / "tokenizer", VOCAB)[0])
        documents = map(Document, texts)
        Pretokenizer(tokenizer, folder / "shards", val_fraction=0.2).run(documents)
        began = time.monotonic()
        self._reference = self._finish("reference")
        self._duration = time.monotonic() - began

    def kill_runs(self, count: int) -> FaultResult:
        return self._end_runs("kill -9 at a random moment", count, [signal.SIGKILL], (-signal.SIGKILL,))

    def interrupt_runs(self, count: int) -> FaultResult:
        """Sends Ctrl-C or SIGTERM, after which the program exits with 130."""
        signals = [signal.SIGINT, signal.SIGTERM]
        # Before its handlers are installed, the signal ends it like any program.
        return self._end_runs("Ctrl-C, SIGTERM", count, signals, (130, -signal.SIGTERM, -signal.SIGINT))

    def _end_runs(
        self, fault: str, count: int, signals: list[signal.Signals], exit_codes: tuple[int, ...]
    ) -> FaultResult:
        """Signals runs in the last 70% of their duration, in which they train and save, and resumes them."""
        failures, ended, resumed, saving = [], 0, 0, 0
        for number in range(count):
            name = f"{fault.split()[0].strip(',')}{number}"
            delay = self._duration * self._random.uniform(0.3, 1.0)
            for _ in range(MAX_ATTEMPTS):  # a run that is faster than the reference is repeated with a shorter delay
                process = self._start(name)
                try:
                    process.wait(delay)
                except subprocess.TimeoutExpired:
                    process.send_signal(signals[number % len(signals)])
                _, stderr = process.communicate()
                if process.returncode != 0:
                    break
                delay *= 0.8
                shutil.rmtree(self.folder / name)
            ended += process.returncode != 0
            resumed += process.returncode != 0 and bool(checkpoint.saved_steps(self.folder / name))
            saving += any((self.folder / name).glob(".step_*"))
            if process.returncode not in (0, *exit_codes):
                failures.append(f"{name}: exit code {process.returncode}: {_last_line(stderr)}")
            try:
                if differences := ", ".join(self.differences(name)):
                    failures.append(
                        f"{name}: ended after {delay:.3f} s and resumed, differs from the reference run: {differences}"
                    )
            except UserError as error:
                failures.append(f"{name}: {error}")
            shutil.rmtree(self.folder / name, ignore_errors=True)
        note = f": {ended} before the end, {resumed} after a checkpoint, {saving} during a save"
        return FaultResult(fault, count, failures, note)

    def flip_bytes(self, count: int) -> FaultResult:
        """Changes one byte of a file of a checkpoint or of the shards."""

        def flip(data: bytes, position: int) -> bytes:
            return data[:position] + bytes([data[position] ^ self._random.randrange(1, 256)]) + data[position + 1 :]

        return self._damage_files("a byte flipped", count, flip)

    def truncate_files(self, count: int) -> FaultResult:
        return self._damage_files("a file truncated", count, lambda data, position: data[:position])

    def _damage_files(self, fault: str, count: int, damage: Callable[[bytes, int], bytes]) -> FaultResult:
        run, shards = self.folder / "reference", self.folder / "shards"
        newest = checkpoint.find(run)
        files = [newest.folder / name for name in (*checkpoint.FILES, "state.json")]
        shard_files = sorted([*shards.glob("*.npy"), *shards.glob("*.offsets"), shards / "manifest.json"])
        failures = []
        for number in range(count):
            path = (files + shard_files)[number % len(files + shard_files)]
            original = path.read_bytes()
            position = self._random.randrange(len(original))
            path.write_bytes(damage(original, position))
            if not (_finds_older(run, newest.step, path) if path in files else _finds_damage(shards, path)):
                failures.append(f"{path.name}: byte {position} of {len(original)}: not detected")
            path.write_bytes(original)
        return FaultResult(fault, count, failures)

    def command(self, name: str, *words: str) -> list[str]:
        """Returns the command that trains the run `name`, with further arguments."""
        config = self.folder / f"{name}.yaml"
        train = {**SETTINGS["train"], "save_dir": str(self.folder / name)}
        data = {**SETTINGS["data"], "shard_dir": str(self.folder / "shards")}
        config.write_text(dump({**SETTINGS, "train": train, "data": data}), encoding="utf-8")
        return [sys.executable, "-m", "anarchobot", "pretrain", str(config), "--quiet", *words]

    def _start(self, name: str, *words: str) -> "subprocess.Popen[str]":
        command = self.command(name, *words)
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def differences(self, name: str) -> list[str]:
        """Resumes a run to its end; returns the keys that differ from the reference run. Raises UserError if it does
        not finish."""
        result = self._finish(name)
        return [key for key, value in self._reference.items() if result[key] != value]

    def _finish(self, name: str) -> dict[str, Any]:
        """Trains or resumes a run to its end; returns what must not depend on interruptions."""
        process = self._start(name, "--resume-from", "auto")
        _, stderr = process.communicate()
        if process.returncode != 0:
            raise UserError(f"resuming failed with exit code {process.returncode}: {_last_line(stderr)}")
        state = checkpoint.find(self.folder / name).state
        return {key: state[key] for key in COMPARED} | {"best": checkpoint.read_best(self.folder / name, STEPS)}


def _finds_older(run: Path, step: int, path: Path) -> bool:
    """Whether the damage to `path` is reported and the run folder yields an older step."""
    saved = checkpoint.find(run)
    return saved.step < step and any(str(path) in text for text in saved.skipped)


def _finds_damage(folder: Path, path: Path) -> bool:
    try:
        return any(problem and name == path.name for name, problem in verify(folder))
    except UserError as error:
        return str(path) in str(error)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no message"


# A failing disk: each operation of a save fails once.


def fail_each_operation(folder: Path, name: str, error: int) -> FaultResult:
    """Saves steps 1 and 2, then step 3 with `keep` 2, whose first, second, third ... operation fails with `error`."""
    # In a separate process, because it forks, which is unsafe in one that holds MLX's threads.
    command = [sys.executable, "-c", f"from {__name__} import _failing_disk; _failing_disk()", str(folder), str(error)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines, fault = done.stdout.splitlines(), f"each operation of a save: {name}"
    if done.returncode != 0 or not lines:
        return FaultResult(fault, 0, [done.stderr.strip() or "no result"])
    return FaultResult(fault, int(lines[0]), lines[1:])


def _failing_disk() -> None:
    """The separate process: prints the number of operations, then one line per failure."""
    folder, error = Path(sys.argv[1]), int(sys.argv[2])
    failures: list[str] = []
    shutil.rmtree(folder.with_name("before"), ignore_errors=True)
    for step in (1, 2):
        save_test_step(folder.with_name("before"), step)
    number = 1
    while _fail_operation(folder, error, number, failures):
        number += 1
    print(number - 1, *failures, sep="\n")


def _fail_operation(folder: Path, error: int, number: int, failures: list[str]) -> bool:
    """Returns whether the save has an operation of this number; checks the folder after it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.with_name("before"), folder)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _inject_failure(error, number)
            save_test_step(folder, 3)
            checkpoint.rotate(folder, 2)
            code = 0
        except (OSError, UserError):  # UserError: best.json can't be read, so nothing is removed
            code = 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if code not in (0, 2, KILL):
            raise UserError(f"exit code {code}")
        saved = checkpoint.find(folder)
        if saved.step not in (2, 3) or saved.skipped:
            raise UserError(f"step {saved.step} is the newest, {saved.skipped}")
        check_test_step(saved)
        checkpoint.clean_up(folder)  # as the next run does
        save_test_step(folder, 3)
        checkpoint.rotate(folder, 2)
        check_test_step(checkpoint.find(folder))
        left = sorted(path.name for path in folder.iterdir())
        if left != ["latest.json", "step_00000002", "step_00000003"]:
            raise UserError(f"unexpected files: {left}")
    except UserError as problem:
        failures.append(f"operation {number}: {problem}")
    return code != 0 and number < MAX_OPERATIONS


def save_test_step(folder: Path, step: int) -> None:
    """Saves a checkpoint whose arrays depend on `step`."""
    params = init_parameters(DISK_MODEL, step)
    arrays = {f"params/{name}": p for name, p in params.items()} | {"updates": np.array(step)}
    arrays |= {f"optimizer/first/{name}": -p for name, p in params.items()}
    checkpoint.save(folder, step, arrays, {"config": Config(model=DISK_MODEL).model_dump()})


def check_test_step(saved: checkpoint.Checkpoint) -> None:
    """Raises UserError if the arrays differ from `save_test_step`'s."""
    arrays = checkpoint.load_arrays(saved, DISK_MODEL, optimizer=True)
    for name, p in init_parameters(DISK_MODEL, saved.step).items():
        if not (np.array_equal(arrays[f"params/{name}"], p) and np.array_equal(arrays[f"optimizer/first/{name}"], -p)):
            raise UserError(f"step {saved.step}: {name} differs from what was saved")


def _inject_failure(error: int, number: int) -> None:
    """Makes the `number`-th disk operation from now on fail; a failing write writes half of its data."""
    left = number

    def wrap(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                    args[0].flush()
                if error == KILL:
                    os._exit(KILL)
                raise OSError(error, os.strerror(error))
            return real(*args, **kwargs)

        setattr(owner, name, call)

    for owner, name in (
        (durable.HashedFile, "write"), (durable, "fsync"), (durable, "fsync_dir"), (checkpoint, "fsync_dir"),
        (Path, "open"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "rmdir"),
        (os, "unlink"),
    ):  # fmt: skip
        wrap(owner, name)
