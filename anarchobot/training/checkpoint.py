"""Checkpoints: a folder a step, whole or not there, and every byte of it accounted for.

    RUN/step_00002000/model.npz       parameters under Llama's names, float32; any `np.load` opens it
    RUN/step_00002000/optimizer.npz   the moments
    RUN/step_00002000/state.json      step, data position, config, digests of the other two; written last
    RUN/latest.json, RUN/best.json    name a step

A step is written beside its name, flushed to disk and renamed. There is no pickle in it and none is ever loaded.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.loading import config_from_dict
from anarchobot.config.schema import Config, ModelConfig
from anarchobot.data.shards import sha256_file, write_whole
from anarchobot.model.shapes import parameter_shapes

Arrays = dict[str, npt.NDArray[Any]]

PARAMS, OPTIMIZER = "params/", "optimizer/"
FILES = ("model.npz", "optimizer.npz")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and what its state.json says; arrays are loaded by `load_arrays`."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def config(self) -> Config:
        return config_from_dict(self.state["config"], str(self.folder / "state.json"))


def save(run: Path, step: int, arrays: Mapping[str, npt.NDArray[Any]], state: Mapping[str, Any]) -> Path:
    """Writes RUN/step_XXXXXXXX and makes it the latest. `arrays` are an engine's `state()`; its scalars go, with
    `state`, into state.json. A step that is already there is replaced."""
    final = run / f"step_{step:08d}"
    beside = run / f".{final.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    _write_npz(beside / "model.npz", {n.removeprefix(PARAMS): a for n, a in arrays.items() if n.startswith(PARAMS)})
    _write_npz(
        beside / "optimizer.npz", {n.removeprefix(OPTIMIZER): a for n, a in arrays.items() if n.startswith(OPTIMIZER)}
    )
    scalars = {n: a.item() for n, a in arrays.items() if not n.startswith((PARAMS, OPTIMIZER))}
    digests = {name: sha256_file(beside / name) for name in FILES}
    write_json(beside / "state.json", {"step": step, **state, "engine": scalars, "sha256": digests})
    _flush_folder(beside)
    aside = run / f".{final.name}.old"
    if final.exists():
        final.rename(aside)
    beside.rename(final)
    _flush_folder(run)
    shutil.rmtree(aside, ignore_errors=True)
    write_json(run / "latest.json", {"step": step, "folder": final.name})
    return final


def rotate(run: Path, keep: int) -> list[int]:
    """Removes all but the newest `keep` steps and the best one; returns the steps removed."""
    best = _named_step(run / "best.json")
    old = [s for s in sorted(saved_steps(run))[:-keep] if s != best]
    for step in old:
        folder = run / f"step_{step:08d}"
        (folder / "state.json").unlink()  # first: a half-removed step must not look whole
        shutil.rmtree(folder)
    return old


def saved_steps(run: Path) -> list[int]:
    """The steps of the whole checkpoints in a run folder."""
    return [int(p.parent.name.removeprefix("step_")) for p in run.glob(f"step_{'[0-9]' * 8}/state.json")]


def read_best(run: Path, up_to: int) -> dict[str, Any] | None:
    """What best.json says, unless there is none or it names a step after `up_to`."""
    step = _named_step(run / "best.json")
    if step is None or step > up_to:
        return None
    best: dict[str, Any] = json.loads((run / "best.json").read_text(encoding="utf-8"))
    return best


def find(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a step's folder, a file in it, a run's best.json or latest.json, or a run folder, which
    means its newest step.

    Raises UserError when there is none.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if path.name in ("best.json", "latest.json") and (step := _named_step(path)) is not None:
        folder = folder / f"step_{step:08d}"
    if not (folder / "state.json").is_file():
        steps = saved_steps(folder) if folder.is_dir() else []
        if not steps:
            raise UserError(f"{path}: no checkpoint here: expected a run folder or one of its step_… folders")
        folder = folder / f"step_{max(steps):08d}"
    file = folder / "state.json"
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        return Checkpoint(folder, {"step": int(state["step"]), "config": state["config"], **state})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: damaged ({error!r}): take an older step of this run") from error


def load_arrays(checkpoint: Checkpoint, model: ModelConfig, *, optimizer: bool) -> Arrays:
    """An engine's `state()` again, digests checked; without `optimizer`, the parameters alone.

    Raises UserError when a file is damaged, or the parameters are not those of `model`.
    """
    digests = checkpoint.state.get("sha256", {})
    arrays: Arrays = {}
    for name, prefix in zip(FILES, (PARAMS, OPTIMIZER), strict=True):
        if name == "optimizer.npz" and not optimizer:
            continue
        file = checkpoint.folder / name
        try:
            if sha256_file(file) != digests.get(name):
                raise UserError(f"{file}: damaged (its sha256 is not what was written): take an older step of this run")
            with np.load(file, allow_pickle=False) as npz:
                arrays |= {prefix + key: npz[key] for key in npz.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"{file}: can't be read ({error}): take an older step of this run") from error
    _check_shapes(checkpoint.folder, arrays, model)
    return arrays | {name: np.array(value) for name, value in checkpoint.state.get("engine", {}).items()}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes beside, flushes, renames."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def _check_shapes(folder: Path, arrays: Arrays, model: ModelConfig) -> None:
    wanted = parameter_shapes(model)
    found = {n.removeprefix(PARAMS): a.shape for n, a in arrays.items() if n.startswith(PARAMS)}
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            shapes = [str(list(s)) if s is not None else "none" for s in (found.get(name), wanted.get(name))]
            raise UserError(
                f"{folder}: this checkpoint is of another model: {name} is {shapes[0]}, the config's model asks for "
                f"{shapes[1]}: use the config.yaml that lies in its run folder"
            )


def _write_npz(path: Path, arrays: Arrays) -> None:
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named_step(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
