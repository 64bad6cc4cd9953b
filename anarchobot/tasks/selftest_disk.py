"""Every operation on the disk that a save makes, made to fail in turn: by a full disk, by an I/O error, by a kill."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.model.parameters import init_parameters
from anarchobot.runs import checkpoint
from anarchobot.storage import durable
from anarchobot.tasks.selftest import Outcome

MODEL = ModelConfig(vocab_size=16, n_layers=1, d_model=8, n_heads=1)
KILLED = 9
MOST = 1000  # operations of a save, far more than there are


def every_operation_fails(folder: Path) -> Iterator[Outcome]:
    """In three ways."""
    for name, how in (("a full disk", errno.ENOSPC), ("an I/O error", errno.EIO), ("kill -9", KILLED)):
        yield operation_fails(folder, name, how)


def operation_fails(folder: Path, name: str, how: int) -> Outcome:
    """Steps 1 and 2 are saved; then step 3 is, with `keep` 2, and its first, second, third ... operation fails."""
    # In a process of its own, which forks: one that holds MLX's threads must not.
    command = [sys.executable, "-c", f"from {__name__} import _main; _main()", str(folder), str(how)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return Outcome(f"each operation of a save: {name}", 0, [done.stderr.strip() or "no result"])
    return Outcome(f"each operation of a save: {name}", int(lines[0]), lines[1:])


def _main() -> None:
    folder, how = Path(sys.argv[1]), int(sys.argv[2])
    failures: list[str] = []
    shutil.rmtree(folder.with_name("before"), ignore_errors=True)
    for step in (1, 2):
        _save(folder.with_name("before"), step)
    number = 1
    while _fails(folder, how, number, failures):
        number += 1
    print(number - 1, *failures, sep="\n")


def _fails(folder: Path, how: int, number: int, failures: list[str]) -> bool:
    """Whether a save has an operation of this number, which failed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folder.with_name("before"), folder)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _make_fail(how, number)
            _save(folder, 3)
            checkpoint.rotate(folder, 2)
            code = 0
        except OSError:
            code = 2
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        if code not in (0, 2, KILLED):
            raise UserError(f"exit code {code}")
        found = checkpoint.find(folder)
        if found.step not in (2, 3) or found.passed_over:
            raise UserError(f"step {found.step} is the newest, {found.passed_over}")
        _check_content(found)
        checkpoint.tidy(folder)  # what the next run does
        _save(folder, 3)
        checkpoint.rotate(folder, 2)
        _check_content(checkpoint.find(folder))
        left = sorted(path.name for path in folder.iterdir())
        if left != ["latest.json", "step_00000002", "step_00000003"]:
            raise UserError(f"left behind: {left}")
    except UserError as error:
        failures.append(f"operation {number}: {error}")
    return code != 0 and number < MOST


def _save(folder: Path, step: int) -> None:
    params = init_parameters(MODEL, step)
    arrays = {f"params/{name}": p for name, p in params.items()} | {"updates": np.array(step)}
    arrays |= {f"optimizer/first/{name}": -p for name, p in params.items()}
    checkpoint.save(folder, step, arrays, {"config": Config(model=MODEL).model_dump()})


def _check_content(found: checkpoint.Checkpoint) -> None:
    arrays = checkpoint.load_arrays(found, MODEL, optimizer=True)
    for name, p in init_parameters(MODEL, found.step).items():
        if not (np.array_equal(arrays[f"params/{name}"], p) and np.array_equal(arrays[f"optimizer/first/{name}"], -p)):
            raise UserError(f"step {found.step}: {name} is not what was saved")


def _make_fail(how: int, number: int) -> None:
    """From here on the `number`-th operation on the disk fails; a write that fails has written a part."""
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
                if how == KILLED:
                    os._exit(KILLED)
                raise OSError(how, os.strerror(how))
            return real(*args, **kwargs)

        setattr(owner, name, call)

    for owner, name in (
        (durable.HashedFile, "write"), (durable, "fsync"), (durable, "fsync_dir"), (checkpoint, "fsync_dir"),
        (Path, "open"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "rmdir"),
        (os, "unlink"),
    ):  # fmt: skip
        wrap(owner, name)
