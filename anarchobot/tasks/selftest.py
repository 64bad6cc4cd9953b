"""What a run survives, tried out: killed, interrupted, its files damaged, its disk failing. `anarchobot selftest`.

A tiny model trains on a page of the built-in text, once unbroken and then again and again with a fault; each broken run
is resumed, and must end with the very bytes of the unbroken one.
"""

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

from anarchobot.config.errors import UserError
from anarchobot.config.strict_yaml import dump
from anarchobot.data.pretokenize import pretokenize
from anarchobot.data.shards import verify
from anarchobot.data.sources import builtin
from anarchobot.data.sources.documents import DocumentCounts, Document
from anarchobot.runs import checkpoint
from anarchobot.tokenizers.tokenizer import load_tokenizer
from anarchobot.tokenizers.training import train_tokenizer

STEPS = 20
MOST_TRIES = 8  # to end a run before its end
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


@dataclass
class Outcome:
    """Of one kind of fault: how many were tried, what went wrong, one line each, and what else there is to say."""

    fault: str
    tried: int
    failures: list[str]
    note: str = ""


class Playground:
    """A folder with shards, a configuration, and the run that nothing disturbed."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self._chance = folder, random.Random(seed)
        texts = list(islice(builtin.topics(), 12))
        (folder / "shards").mkdir(parents=True)
        tokenizer = load_tokenizer(train_tokenizer(texts, folder / "shards" / "made", VOCAB)[0])
        documents = map(Document, texts)
        pretokenize(documents, tokenizer, folder / "shards", counts=DocumentCounts(), val_fraction=0.2, num_workers=1)
        began = time.monotonic()
        self._whole = self._finish("whole")
        self._lasted = time.monotonic() - began

    def kills(self, count: int) -> Outcome:
        """kill -9 at a random moment."""
        return self._broken("kill -9 at a random moment", count, [signal.SIGKILL], (-signal.SIGKILL,))

    def signals(self, count: int) -> Outcome:
        """Ctrl-C or SIGTERM: the program ends by itself, with exit code 130."""
        kinds = [signal.SIGINT, signal.SIGTERM]
        # Before its handlers stand, SIGTERM ends Python as it ends any program.
        return self._broken("Ctrl-C, SIGTERM", count, kinds, (130, -signal.SIGTERM, -signal.SIGINT))

    def _broken(self, fault: str, count: int, kinds: list[signal.Signals], expected: tuple[int, ...]) -> Outcome:
        """The run is ended by one of `kinds` in its latter part, in which it trains and saves, and resumed."""
        failures, ended, resumed, inside = [], 0, 0, 0
        for number in range(count):
            name = f"{fault.split()[0].strip(',')}{number}"
            moment = self._lasted * self._chance.uniform(0.3, 1.0)
            for _ in range(MOST_TRIES):  # the run may be quicker than the unbroken one was: then again, sooner
                process = self._start(name)
                try:
                    process.wait(moment)
                except subprocess.TimeoutExpired:
                    process.send_signal(kinds[number % len(kinds)])
                _, err = process.communicate()
                if process.returncode != 0:
                    break
                moment *= 0.8
                shutil.rmtree(self.folder / name)
            ended += process.returncode != 0
            resumed += process.returncode != 0 and bool(checkpoint.saved_steps(self.folder / name))
            inside += any((self.folder / name).glob(".step_*"))
            if process.returncode not in (0, *expected):
                failures.append(f"{name}: exit code {process.returncode}: {_last_line(err)}")
            try:
                if other := ", ".join(self.differences(name)):
                    failures.append(f"{name}: ended after {moment:.3f} s and resumed, not the unbroken run: {other}")
            except UserError as error:
                failures.append(f"{name}: {error}")
            shutil.rmtree(self.folder / name, ignore_errors=True)
        note = f": {ended} before their end, {resumed} behind a checkpoint, {inside} inside a save"
        return Outcome(fault, count, failures, note)

    def flips(self, count: int) -> Outcome:
        """One byte of a checkpoint's or a shard's file changed."""

        def flipped(data: bytes, place: int) -> bytes:
            return data[:place] + bytes([data[place] ^ self._chance.randrange(1, 256)]) + data[place + 1 :]

        return self._damaged("a byte flipped", count, flipped)

    def truncations(self, count: int) -> Outcome:
        """A file of a checkpoint or of the shards cut off."""
        return self._damaged("a file cut off", count, lambda data, place: data[:place])

    def _damaged(self, fault: str, count: int, change: Callable[[bytes, int], bytes]) -> Outcome:
        run, shards = self.folder / "whole", self.folder / "shards"
        newest = checkpoint.find(run)
        files = [newest.folder / name for name in (*checkpoint.FILES, "state.json")]
        shard_files = sorted([*shards.glob("*.npy"), *shards.glob("*.offsets"), shards / "manifest.json"])
        failures = []
        for number in range(count):
            path = (files + shard_files)[number % len(files + shard_files)]
            good = path.read_bytes()
            place = self._chance.randrange(len(good))
            path.write_bytes(change(good, place))
            if not (_sees_older(run, newest.step, path) if path in files else _sees_shard(shards, path)):
                failures.append(f"{path.name}: byte {place} of {len(good)}: not seen")
            path.write_bytes(good)
        return Outcome(fault, count, failures)

    def command(self, name: str, *words: str) -> list[str]:
        """That trains the run of this name; `words` are put behind it."""
        config = self.folder / f"{name}.yaml"
        train = {**SETTINGS["train"], "save_dir": str(self.folder / name)}
        data = {**SETTINGS["data"], "shard_dir": str(self.folder / "shards")}
        config.write_text(dump({**SETTINGS, "train": train, "data": data}), encoding="utf-8")
        return [sys.executable, "-m", "anarchobot", "pretrain", str(config), "--quiet", *words]

    def _start(self, name: str, *words: str) -> "subprocess.Popen[str]":
        command = self.command(name, *words)
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def differences(self, name: str) -> list[str]:
        """Runs to the end, from where it was; names what is not as in the unbroken run. Raises UserError when it
        doesn't get there."""
        resumed = self._finish(name)
        return [key for key, value in self._whole.items() if resumed[key] != value]

    def _finish(self, name: str) -> dict[str, Any]:
        """Runs to the end, from where it was; returns what must be the same however often it was broken."""
        process = self._start(name, "--resume-from", "auto")
        _, err = process.communicate()
        if process.returncode != 0:
            raise UserError(f"resuming ended with exit code {process.returncode}: {_last_line(err)}")
        state = checkpoint.find(self.folder / name).state
        best = checkpoint.read_best(self.folder / name, STEPS)
        kept = ("step", "tokens", "data_position", "loss", "norms", "sha256", "best_val_loss")
        return {key: state[key] for key in kept} | {"best": best}


def _sees_older(run: Path, step: int, path: Path) -> bool:
    """The damage is seen by name, and the run's folder gives the step before."""
    found = checkpoint.find(run)
    return found.step < step and any(str(path) in text for text in found.skipped)


def _sees_shard(folder: Path, path: Path) -> bool:
    try:
        return any(problem and name == path.name for name, problem in verify(folder))
    except UserError as error:
        return str(path) in str(error)


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else "no message"


def all_faults(folder: Path, kills: int, seed: int) -> Iterator[Outcome]:
    """Every kind of fault, in `folder`, which is empty; `kills` runs are killed, a fifth as many interrupted."""
    playground = Playground(folder, seed)
    yield playground.kills(kills)
    yield playground.signals(max(2, kills // 5))
    yield playground.flips(200)
    yield playground.truncations(50)
    from anarchobot.tasks.selftest_disk import every_operation_fails

    yield from every_operation_fails(folder / "disk")
