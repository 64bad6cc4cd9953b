"""Checkpoints: a folder a step, whole or not there, and every byte of it accounted for.

    RUN/step_00002000/model.npz       parameters under Llama's names, float32; any `np.load` opens it
    RUN/step_00002000/optimizer.npz   the moments
    RUN/step_00002000/state.json      step, data position, config, digests of the other two and of itself; written last
    RUN/latest.json, RUN/best.json    name a step

A step is written beside its name, flushed to disk, read back and renamed. There is no pickle in it and none is ever
loaded.
"""

import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.loading import config_from_dict
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.model.lora import trained_shapes
from anarchobot.storage.durable import HashedFile, fsync_dir, read_sealed, sha256_file, write_sealed

Arrays = dict[str, npt.NDArray[Any]]

PARAMS, OPTIMIZER = "params/", "optimizer/"
MODEL_FILE, OPTIMIZER_FILE = "model.npz", "optimizer.npz"
FILES = (MODEL_FILE, OPTIMIZER_FILE)
FINISHED = f"step_{'[0-9]' * 8}/state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what its state.json says; arrays are loaded by `load_arrays`. `passed_over`: what is
    wrong with newer ones of the run."""

    folder: Path
    state: dict[str, Any]
    passed_over: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def config(self) -> Config:
        return config_from_dict(self.state["config"], str(self.folder / "state.json"))


def save(run: Path, step: int, arrays: Mapping[str, npt.NDArray[Any]], state: Mapping[str, Any]) -> Path:
    """Writes RUN/step_XXXXXXXX and makes it the latest. `arrays` are an engine's `state()`; its scalars go, with
    `state`, into state.json. A step that is already there is replaced.

    Raises OSError when it can't be written, or what the disk gives back is not what was written; FloatingPointError
    when a parameter is not finite. What was there before is still there then.
    """
    final = folder_of(run, step)
    beside = run / f".{final.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        params = {n.removeprefix(PARAMS): a for n, a in arrays.items() if n.startswith(PARAMS)}
        moments = {n.removeprefix(OPTIMIZER): a for n, a in arrays.items() if n.startswith(OPTIMIZER)}
        _check_finite(params)
        digests = {
            MODEL_FILE: _write_npz(beside / MODEL_FILE, params),
            OPTIMIZER_FILE: _write_npz(beside / OPTIMIZER_FILE, moments),
        }
        scalars = {n: a.item() for n, a in arrays.items() if not n.startswith((PARAMS, OPTIMIZER))}
        write_sealed(beside / "state.json", {"step": step, **state, "engine": scalars, "sha256": digests})
        if problem := _damage(beside, digests, FILES):
            raise OSError(f"{problem}: the disk gives back other bytes than were written")
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    aside = run / f".{final.name}.old"
    if final.exists():
        final.rename(aside)
    beside.rename(final)
    fsync_dir(run)
    shutil.rmtree(aside, ignore_errors=True)
    write_sealed(run / "latest.json", {"step": step, "folder": final.name})
    return final


def rotate(run: Path, keep: int, spared: int | None = None) -> list[int]:
    """Removes all but the newest `keep` steps, the best one and `spared`; returns the steps removed."""
    kept = (named_step(run / "best.json"), spared)
    old = [s for s in sorted(saved_steps(run))[:-keep] if s not in kept]
    for step in old:
        folder = folder_of(run, step)
        (folder / "state.json").unlink()  # first: a half-removed step must not look whole
        shutil.rmtree(folder)
    return old


def tidy(run: Path) -> None:
    """Clears away what a killed run left half-done: a step half-written, a step put aside for one that did not come,
    a step half-removed. Only for whom holds the run's lock."""
    for aside in run.glob(".step_*.old"):
        final = run / aside.name.removeprefix(".").removesuffix(".old")
        if not final.exists():
            aside.rename(final)
        else:
            shutil.rmtree(aside)
    for beside in run.glob(".step_*.tmp"):
        shutil.rmtree(beside)
    for folder in run.glob(f"step_{'[0-9]' * 8}"):
        if not (folder / "state.json").exists():
            shutil.rmtree(folder)


def set_aside(run: Path, newer_than: int) -> list[Path]:
    """Renames later steps, which are damaged, to NAME.damaged, so that they are neither taken nor lost."""
    moved = []
    for step in saved_steps(run):
        if step > newer_than:
            folder = folder_of(run, step)
            target = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(target, ignore_errors=True)  # of an earlier time
            moved.append(folder.rename(target))
    return moved


def folder_of(run: Path, step: int) -> Path:
    return run / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """The steps of the whole checkpoints in a run folder."""
    return [int(p.parent.name.removeprefix("step_")) for p in run.glob(FINISHED)]


def read_best(run: Path, up_to: int) -> dict[str, Any] | None:
    """What best.json says, unless it is not there or damaged, or names a step after `up_to` or one that is gone."""
    step = named_step(run / "best.json")
    if step is None or step > up_to or step not in saved_steps(run):
        return None
    return read_sealed(run / "best.json")


def find(path: str | Path, *, files: tuple[str, ...] = FILES) -> Checkpoint:
    """The checkpoint at `path`: a step's folder, a file in it, a run's best.json, or a run folder or its latest.json,
    which mean its newest step that is not damaged. `files` are those that will be needed, and are checked.

    Raises UserError when there is none, or the one asked for is damaged.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if path.name == "best.json" and (step := named_step(path)) is not None:
        folder = folder_of(folder, step)
    if (folder / "state.json").is_file():
        return _checked(folder, files)
    steps = sorted(saved_steps(folder), reverse=True) if folder.is_dir() else []
    if not steps:
        raise UserError(f"{path}: no checkpoint here: expected a run folder or one of its step_… folders")
    damaged: list[str] = []
    for step in steps:
        try:
            found = _checked(folder_of(folder, step), files)
            return Checkpoint(found.folder, found.state, tuple(damaged))
        except UserError as error:
            damaged.append(str(error).partition(": take an older")[0])
    raise UserError(f"{folder}: every checkpoint here is damaged; the newest: {damaged[0]}")


def _checked(folder: Path, files: tuple[str, ...]) -> Checkpoint:
    """Raises UserError when one of `files`, or state.json, is not as it was written."""
    file = folder / "state.json"
    try:
        state = read_sealed(file)
        digests = dict(state["sha256"])
        checkpoint = Checkpoint(folder, {"step": int(state["step"]), "config": state["config"], **state})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error}): take an older step of this run") from error
    if problem := _damage(folder, digests, files):
        raise UserError(f"{problem}: take an older step of this run")
    return checkpoint


def _damage(folder: Path, digests: Mapping[str, Any], files: tuple[str, ...]) -> str:
    """The first of `files` that is damaged, and how; nothing when all are as they were written."""
    for name in files:
        try:
            if sha256_file(folder / name) != digests.get(name):
                return f"{folder / name}: damaged (its sha256 is not what was written)"
        except OSError as error:
            return f"{folder / name}: can't be read ({error.strerror})"
    return ""


def load_arrays(checkpoint: Checkpoint, model: ModelConfig, *, optimizer: bool) -> Arrays:
    """An engine's `state()` again, of a checkpoint that `find` checked; without `optimizer`, the parameters alone.

    Raises UserError when a file can't be read, or the parameters are not those of `model`; also when they are adapters
    and, without `optimizer`, a model is asked for.
    """
    lora = checkpoint.config.lora
    if lora.r is not None and not optimizer:
        raise UserError(
            f"{checkpoint.folder}: adapters (lora.r: {lora.r}), not a whole model: join them with their model first "
            "(anarchobot fuse)"
        )
    arrays = _load(checkpoint, ((MODEL_FILE, PARAMS), (OPTIMIZER_FILE, OPTIMIZER))[: 2 if optimizer else 1])
    _check_shapes(checkpoint.folder, arrays, trained_shapes(model, lora))
    return arrays | {name: np.array(value) for name, value in checkpoint.state.get("engine", {}).items()}


def load_adapters(checkpoint: Checkpoint) -> Arrays:
    """The adapters by name, of a checkpoint that `find` checked. Raises UserError as `load_arrays`, and when it holds a
    whole model."""
    config = checkpoint.config
    if config.lora.r is None:
        raise UserError(f"{checkpoint.folder}: a whole model, not adapters (its config has no lora.r)")
    arrays = _load(checkpoint, ((MODEL_FILE, PARAMS),))
    _check_shapes(checkpoint.folder, arrays, trained_shapes(config.model, config.lora))
    return {name.removeprefix(PARAMS): array for name, array in arrays.items()}


def _load(checkpoint: Checkpoint, files: Iterable[tuple[str, str]]) -> Arrays:
    """The arrays of `files`, each with the prefix that its names get."""
    arrays: Arrays = {}
    for name, prefix in files:
        file = checkpoint.folder / name
        try:
            with np.load(file, allow_pickle=False) as npz:
                arrays |= {prefix + key: npz[key] for key in npz.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{file}: can't be read ({error}): take an older step of this run") from error
    return arrays


def named_step(file: Path) -> int | None:
    """The step that best.json or latest.json names; None when it is not there, or damaged."""
    try:
        return int(read_sealed(file)["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_shapes(folder: Path, arrays: Arrays, wanted: Mapping[str, tuple[int, ...]]) -> None:
    found = {n.removeprefix(PARAMS): a.shape for n, a in arrays.items() if n.startswith(PARAMS)}
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            shapes = [str(list(s)) if s is not None else "none" for s in (found.get(name), wanted.get(name))]
            raise UserError(
                f"{folder}: this checkpoint is of another model: {name} is {shapes[0]}, the config's model asks for "
                f"{shapes[1]}: use the config.yaml that lies in its run folder"
            )


def _check_finite(params: Arrays) -> None:
    for name, array in params.items():
        if not np.isfinite(array).all():
            raise FloatingPointError(f"{name} is not finite")


def _write_npz(path: Path, arrays: Arrays) -> str:
    """As np.savez does, but with the same bytes for the same arrays; returns their sha256."""
    with HashedFile(path) as file:
        with zipfile.ZipFile(file, "w") as archive:  # type: ignore[call-overload]  # it asks for no more than `write`
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
        return file.finish()
