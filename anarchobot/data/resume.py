"""What shards were made of, so that a pretokenize run never mixes or replaces those of another.

`progress.json`, beside the shards, says all that they depend on and lists the finished ones. A run that was stopped,
even by kill -9, goes on behind the last of them: it reads the documents again from the start, which costs little and
needs no state of what came before, but passes over those that finished shards hold.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.document_batches import Mask, Pieces
from anarchobot.data.shard_writer import Finished
from anarchobot.data.shards import SPLITS, Shard, Split
from anarchobot.data.sources import files, hub
from anarchobot.storage.durable import sha256_file, write_atomic

Provenance = Mapping[str, Any]  # what decides the shards' bytes: JSON values under names that a person understands

TOLD = 3  # changes that an error names

# Settings that change no shard, and those that pretokenize is given by themselves.
NOT_OF_DOCUMENTS = {
    *("num_workers", "shard_dir", "shard_weights", "seq_len", "pack", "document_mask", "cache_dir", "fallback"),
    *("val_fraction", "dedup", "near_dedup"),
}


def source_provenance(names: list[str], data: DataConfig) -> dict[str, Any]:
    """What the documents of these datasets depend on: settings, and the size and time of each file."""
    source: dict[str, Any] = {
        f"data.{key}": value for key, value in data.model_dump().items() if key not in NOT_OF_DOCUMENTS
    }
    source["data.dataset"] = names
    for name in names:
        if name != "builtin" and not hub.is_hub_name(name):
            for path in files.find([name]):
                stat = path.stat()
                source[str(path)] = f"{stat.st_size} bytes, written {stat.st_mtime_ns / 1e9:.6f}"
    return source


def save_progress(folder: Path, made_of: Provenance, finished: Iterable[Finished]) -> None:
    content = {"made_of": dict(made_of), "finished": [asdict(f) for f in finished]}
    write_atomic(folder / "progress.json", json.dumps(content, indent=1) + "\n")


def load_progress(folder: Path, made_of: Provenance, restart: bool) -> list[Finished]:
    """The finished shards of an earlier run: none when there was no such run, or `restart` is set.

    A shard that is gone or damaged by now is left out, with all of its split behind it. What else a stopped run left is
    removed. Raises UserError, which names what changed, when there are shards and they were `made_of` anything else.
    """
    listed = [] if restart else _read(folder, made_of)
    whole: list[Finished] = []
    for split in SPLITS:
        whole += takewhile(lambda f: _is_whole(folder, f.shard), (f for f in listed if f.shard.split == split))
    kept = {f"{name}.tmp" for finished in whole for name in finished.shard.files}
    for path in shard_files(folder, ".tmp"):
        if path.name not in kept:
            path.unlink()
    save_progress(folder, made_of, whole)
    return whole


def shard_files(folder: Path, suffix: str = "") -> list[Path]:
    kinds = [f"{split}_{'[0-9]' * 5}.{kind}{suffix}" for split in SPLITS for kind in ("npy", "offsets")]
    return [path for kind in kinds for path in folder.glob(kind)]


def _read(folder: Path, made_of: Provenance) -> list[Finished]:
    path, has_shards = folder / "progress.json", (folder / "manifest.json").exists()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        before = dict(content["made_of"])
        finished = [Finished(Shard(**f["shard"]), f["keys_sha256"]) for f in content["finished"]]
    except FileNotFoundError:
        if has_shards:
            raise UserError(
                f"{folder}: holds shards, and no progress.json that says what they were made of: choose another "
                "folder, or replace them with --restart"
            ) from None
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}): start anew with --restart") from error
    told = difference(before, made_of)
    if not told:
        return finished
    if not finished and not has_shards:
        return []
    what, do = "a run that was stopped here can't go on, for this has changed", "undo that, or start anew"
    if has_shards:
        what, do = "holds shards that were made otherwise", "choose another folder, or replace them"
    raise UserError(f"{folder}: {what}: {told}: {do} with --restart")


def check_provenance(folder: Path, made_of: Provenance) -> None:
    """Raises UserError when there are shards in the folder, and they were made of anything else."""
    _read(folder, made_of)


def difference(before: Provenance, made_of: Provenance) -> str:
    """What has changed since, for people; empty when nothing has."""
    now = json.loads(json.dumps(dict(made_of)))
    changed = [key for key in {**before, **now} if before.get(key, "absent") != now.get(key, "absent")]
    told = [f"{key} (was {before.get(key, 'absent')}, is {now.get(key, 'absent')})" for key in changed[:TOLD]]
    return ", ".join(told) + (f" and {len(changed) - TOLD} more" if len(changed) > TOLD else "")


def _is_whole(folder: Path, shard: Shard) -> bool:
    """Beside its final name, or already there when the run was stopped while it put its shards in place."""
    for name, sha256 in zip(shard.files, (shard.sha256, shard.offsets_sha256), strict=True):
        beside = folder / f"{name}.tmp"
        path = beside if beside.exists() else folder / name
        if not path.is_file() or sha256_file(path) != sha256:
            return False
    return True


class Passed:
    """The pieces that finished shards hold: of each split the first ones, as many as the shards say, and the same."""

    def __init__(self, finished: Iterable[Finished], progress: Callable[[int, int], None]) -> None:
        """`progress(bytes, tokens)` is called behind each shard."""
        self._left: dict[Split, deque[Finished]] = {split: deque() for split in SPLITS}
        for f in finished:
            self._left[f.shard.split].append(f)
        self._pieces = dict.fromkeys(SPLITS, 0)
        self._keys = {split: hashlib.sha256() for split in SPLITS}
        self._progress = progress

    def new_of(self, unit: Pieces) -> Mask:
        """Which of these pieces, the next of their splits, are in no finished shard. Raises UserError at the end of a
        shard that was made of other text."""
        new = np.ones(len(unit), bool)
        for split, of_split in zip(SPLITS, (~unit.is_val, unit.is_val), strict=True):
            places = np.flatnonzero(of_split)
            new[places[: self._held(split, unit.keys[places])]] = False
        return new

    def _held(self, split: Split, keys: npt.NDArray[np.void]) -> int:
        """How many of the next pieces of a split, which have these keys, are in finished shards."""
        left, held = self._left[split], 0
        while left and held < len(keys):
            shard = left[0].shard
            own = keys[held : held + shard.documents - self._pieces[split]]
            self._keys[split].update(own.data)
            self._pieces[split] += len(own)
            held += len(own)
            if self._pieces[split] == shard.documents:
                if self._keys[split].hexdigest() != left[0].keys_sha256:
                    raise _changed(shard)
                left.popleft()
                self._pieces[split], self._keys[split] = 0, hashlib.sha256()
                self._progress(shard.bytes, shard.tokens)
        return held

    def check_end(self) -> None:
        """Raises UserError when there were fewer pieces than the shards hold."""
        for left in self._left.values():
            if left:
                raise _changed(left[0].shard)


def _changed(shard: Shard) -> UserError:
    return UserError(f"{shard.file}: an earlier run made this shard of other documents: start anew with --restart")
