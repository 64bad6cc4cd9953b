"""Checkpoints: one folder per step, written atomically, with every byte covered by a SHA-256 digest.

    RUN/step_00002000/model.npz       parameters under Hugging Face's names, float32; opens with plain `np.load`
    RUN/step_00002000/optimizer.npz   optimizer state
    RUN/step_00002000/state.json      step, data position, config, digests of all three files; written last
    RUN/latest.json, RUN/best.json    the number of a step

A step is written to a temporary folder, fsynced, read back, verified and renamed. Nothing is pickled or unpickled.
"""

import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.loading import config_from_dict
from anarchobot.config.paths import RUNS, did_you_mean_run, such_as_runs
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.model.lora import trained_shapes
from anarchobot.storage.durable import HashedFile, fsync_dir, read_checksummed, sha256_file, write_checksummed
from anarchobot.storage.npz import NpzReader, open_npz

Arrays = dict[str, npt.NDArray[Any]]

PARAMS, OPTIMIZER = "params/", "optimizer/"
MODEL_FILE, OPTIMIZER_FILE = "model.npz", "optimizer.npz"
FILES = (MODEL_FILE, OPTIMIZER_FILE)
BEST, LATEST = "best.json", "latest.json"
_STEP_GLOB = f"step_{'[0-9]' * 8}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and the contents of its state.json; `load_arrays` loads the arrays. `skipped` describes the
    damage in newer checkpoints of the run that `find` skipped."""

    folder: Path
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def config(self) -> Config:
        return config_from_dict(self.state["config"], str(self.folder / "state.json"))


def save(run: Path, step: int, arrays: Mapping[str, npt.NDArray[Any]], state: Mapping[str, Any]) -> Path:
    """Writes RUN/step_XXXXXXXX and updates latest.json. `arrays` is an engine's `state()`; its scalars go into
    state.json together with `state`. An existing checkpoint of the same step is replaced.

    Raises OSError if writing or verification fails, FloatingPointError if a parameter is not finite. Existing
    checkpoints are left intact in both cases.
    """
    final = step_folder(run, step)
    temporary = run / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        params = {n.removeprefix(PARAMS): a for n, a in arrays.items() if n.startswith(PARAMS)}
        moments = {n.removeprefix(OPTIMIZER): a for n, a in arrays.items() if n.startswith(OPTIMIZER)}
        _check_finite(params)
        digests = {
            MODEL_FILE: _write_npz(temporary / MODEL_FILE, params),
            OPTIMIZER_FILE: _write_npz(temporary / OPTIMIZER_FILE, moments),
        }
        scalars = {n: a.item() for n, a in arrays.items() if not n.startswith((PARAMS, OPTIMIZER))}
        write_checksummed(temporary / "state.json", {"step": step, **state, "engine": scalars, "sha256": digests})
        if problem := _damage(temporary, digests, FILES):
            raise OSError(f"{problem}: the disk returned different bytes than were written")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    aside = run / f".{final.name}.old"
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    fsync_dir(run)
    shutil.rmtree(aside, ignore_errors=True)
    write_checksummed(run / LATEST, {"step": step, "folder": final.name})
    return final


def rotate(run: Path, keep: int, protected: Collection[int] = ()) -> list[int]:
    """Removes all checkpoints but the newest `keep`, the best one and the steps `protected`; returns the removed steps.

    Raises UserError, and removes nothing, if best.json is damaged: any step could be the best one.
    """
    kept = {best_step(run), *protected}
    old = [s for s in sorted(saved_steps(run))[:-keep] if s not in kept]
    for step in old:
        folder = step_folder(run, step)
        (folder / "state.json").unlink()  # first, so that a partly removed step doesn't look complete
        shutil.rmtree(folder)
    return old


def clean_up(run: Path) -> None:
    """Removes what a killed run left unfinished: partly written or partly removed steps. Restores a step whose
    replacement was never renamed into place. The caller must hold the run's lock."""
    for aside in run.glob(".step_*.old"):
        final = run / aside.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            aside.rename(final)
        else:
            shutil.rmtree(aside)
    for temporary in run.glob(".step_*.tmp"):
        shutil.rmtree(temporary)
    for folder in run.glob(_STEP_GLOB):
        if not (folder / "state.json").exists():
            shutil.rmtree(folder)


def quarantine(run: Path, newer_than: int) -> list[Path]:
    """Renames damaged checkpoints after step `newer_than` to NAME.damaged, so that they are neither used nor lost."""
    moved = []
    for step in saved_steps(run):
        if step > newer_than:
            folder = step_folder(run, step)
            target = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(target, ignore_errors=True)  # from an earlier quarantine
            moved.append(folder.rename(target))
    return moved


def step_folder(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Returns the steps of all complete checkpoints in a run folder, unsorted."""
    return [int(p.parent.name.removeprefix("step_")) for p in run.glob(f"{_STEP_GLOB}/state.json")]


def best_step(run: Path) -> int | None:
    """Returns the step in best.json, or None if there is no such file. Raises UserError if it is damaged."""
    file = run / BEST
    try:
        return int(read_checksummed(file)["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: damaged ({error}): delete it, and name a step_... folder instead") from error


def read_best(run: Path, max_step: int) -> dict[str, Any] | None:
    """Returns the contents of best.json; None if it is missing, damaged, after `max_step`, or its step is missing."""
    try:
        step = best_step(run)
    except UserError:
        return None
    if step is None or step > max_step or step not in saved_steps(run):
        return None
    return read_checksummed(run / BEST)


def write_best(run: Path, step: int, values: Mapping[str, Any]) -> None:
    write_checksummed(run / BEST, {"step": step, "folder": step_folder(run, step).name, **values})


def find(path: str | Path, *, files: tuple[str, ...] = FILES, also_expected: str = "") -> Checkpoint:
    """Finds and verifies the checkpoint at `path`: a step folder, a file in it, or a run's best.json. A run folder or
    its latest.json selects the newest undamaged step. `files` are the files to verify; `also_expected`
    ends the error if there is no checkpoint.

    Raises UserError if there is no checkpoint, or the requested one or best.json is damaged.
    """
    # A step reached by a link belongs to its own run: the tokenizer is in that folder, not beside the link.
    path = _without_link(Path(path))
    folder = _without_link(path.parent) if path.is_file() else path
    if path.name == BEST and (step := best_step(path.parent)) is not None:
        folder = step_folder(folder, step)
    if (folder / "state.json").is_file():
        return _verified(folder, files)
    steps = sorted(saved_steps(folder), reverse=True) if folder.is_dir() else []
    if not steps:
        near = did_you_mean_run(path) if path != RUNS else such_as_runs()
        raise UserError(
            f"{path}: no checkpoint here: expected a run folder or one of its step_… folders{also_expected}{near}"
        )
    damaged: list[str] = []
    for step in steps:
        try:
            newest = _verified(step_folder(folder, step), files)
            return Checkpoint(newest.folder, newest.state, tuple(damaged))
        except UserError as error:
            damaged.append(str(error).partition(": use an older")[0])
    raise UserError(f"{folder}: every checkpoint here is damaged; newest: {damaged[0]}")


def _without_link(path: Path) -> Path:
    return path.resolve() if path.is_symlink() else path


def _verified(folder: Path, files: tuple[str, ...]) -> Checkpoint:
    """Raises UserError if state.json or one of `files` is damaged."""
    file = folder / "state.json"
    try:
        state = read_checksummed(file)
        digests = dict(state["sha256"])
        if not isinstance(state.get("engine", {}), dict):
            raise TypeError("engine: not a mapping")
        checkpoint = Checkpoint(folder, {"step": int(state["step"]), "config": state["config"], **state})
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{file}: damaged ({error}): use an older step of this run") from error
    if problem := _damage(folder, digests, files):
        raise UserError(f"{problem}: use an older step of this run")
    return checkpoint


def _damage(folder: Path, digests: Mapping[str, Any], files: tuple[str, ...]) -> str:
    """Describes the first damaged file, or returns an empty string if all digests match."""
    for name in files:
        try:
            if sha256_file(folder / name) != digests.get(name):
                return f"{folder / name}: damaged (SHA-256 mismatch)"
        except OSError as error:
            return f"{folder / name}: can't be read ({error.strerror})"
    return ""


def load_arrays(checkpoint: Checkpoint, model: ModelConfig, *, optimizer: bool) -> Arrays:
    """Loads the state to pass to an engine's `load_state`; without `optimizer`, only parameters and scalars.

    Raises UserError if a file can't be read or the parameter shapes don't match `model`, and, without `optimizer`, if
    the checkpoint holds only adapters.
    """
    lora = checkpoint.config.lora
    if lora.r is not None and not optimizer:
        raise UserError(
            f"{checkpoint.folder}: adapters (lora.r: {lora.r}), not a whole model: fuse them with their model first: "
            f"anarchobot fuse --model {checkpoint.config.train.init_from} --adapter {checkpoint.folder.parent} "
            "--output NEW_FOLDER"
        )
    arrays = _load_parameters(checkpoint, trained_shapes(model, lora))
    if optimizer:
        with _open(checkpoint.folder / OPTIMIZER_FILE) as npz:
            arrays |= {OPTIMIZER + name: npz.load(name) for name in npz.headers}
    return arrays | {name: np.array(value) for name, value in checkpoint.state.get("engine", {}).items()}


def load_adapters(checkpoint: Checkpoint) -> Arrays:
    """Loads adapters by name. Raises UserError like `load_arrays`, and if the checkpoint holds a whole model."""
    config = checkpoint.config
    if config.lora.r is None:
        raise UserError(f"{checkpoint.folder}: a whole model, not adapters (its config has no lora.r)")
    arrays = _load_parameters(checkpoint, trained_shapes(config.model, config.lora))
    return {name.removeprefix(PARAMS): array for name, array in arrays.items()}


def check_parameters(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises UserError if the parameters do not have these shapes, without loading them."""
    with _open(checkpoint.folder / MODEL_FILE) as npz:
        _check_shapes(checkpoint.folder, npz, shapes)


def load_parameter(checkpoint: Checkpoint, name: str) -> npt.NDArray[Any]:
    """Loads one parameter. Raises UserError if it can't be read."""
    with _open(checkpoint.folder / MODEL_FILE) as npz:
        return npz.load(name)


def _load_parameters(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    with _open(checkpoint.folder / MODEL_FILE) as npz:
        _check_shapes(checkpoint.folder, npz, shapes)
        return {PARAMS + name: npz.load(name) for name in npz.headers}


@contextmanager
def _open(file: Path) -> Iterator[NpzReader]:
    try:
        with open_npz(file) as npz:
            yield npz
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: can't be read ({error}): use an older step of this run") from error


def _check_shapes(folder: Path, npz: NpzReader, wanted: Mapping[str, tuple[int, ...]]) -> None:
    actual = {name: header.shape for name, header in npz.headers.items()}
    for name in [*wanted, *actual]:
        if actual.get(name) != wanted.get(name):
            shapes = [str(list(s)) if s is not None else "none" for s in (actual.get(name), wanted.get(name))]
            raise UserError(
                f"{folder}: checkpoint does not match the config's model: {name} has shape {shapes[0]}, expected "
                f"{shapes[1]}: use the config.yaml in its run folder"
            )


def _check_finite(params: Arrays) -> None:
    for name, array in params.items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"{name} is not finite")


def _write_npz(path: Path, arrays: Arrays) -> str:
    """Like np.savez, but the same arrays always give the same bytes; returns the file's SHA-256."""
    with HashedFile(path) as file:
        with zipfile.ZipFile(file, "w") as archive:  # type: ignore[call-overload]  # it only needs `write`
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        return file.finish()
