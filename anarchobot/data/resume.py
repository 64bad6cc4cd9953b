"""Resuming pretokenization, without mixing it with the shards of a different run.

`progress.json`, beside the shards, records everything that their bytes depend on and lists the finished shards. A run
that was interrupted, even by kill -9, resumes after the last finished shard. It reads the documents again from the
start, which is cheap and needs no saved reader state, and skips those that finished shards already hold.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.document_batches import DocumentBatch, Mask
from anarchobot.data.shard_writer import FinishedShard
from anarchobot.data.shards import SPLITS, Shard, Split, read_manifest
from anarchobot.data.sources import files, hub
from anarchobot.storage.durable import sha256_file, write_atomic

Provenance = Mapping[str, Any]  # everything the shards' bytes depend on: JSON values under readable names

MAX_CHANGES = 3  # listed in an error

# Settings that do not affect the documents, and those recorded separately.
EXCLUDED_SETTINGS = {
    *("num_workers", "shard_dir", "shard_weights", "seq_len", "pack", "document_mask", "cache_dir", "fallback"),
    *("val_fraction", "dedup", "near_dedup"),
}


def source_provenance(names: list[str], data: DataConfig) -> dict[str, Any]:
    """What the documents of these datasets depend on: settings, and the size and modification time of each file."""
    source: dict[str, Any] = {
        f"data.{key}": value for key, value in data.model_dump().items() if key not in EXCLUDED_SETTINGS
    }
    source["data.dataset"] = names
    for name in names:
        if name != "builtin" and not hub.is_hub_name(name):
            for path in files.find([name]):
                stat = path.stat()
                source[str(path)] = f"{stat.st_size} bytes, written {stat.st_mtime_ns / 1e9:.6f}"
    return source


@dataclass(frozen=True)
class Progress:
    """The content of progress.json: the finished shards, and whether they are all."""

    finished: list[FinishedShard]
    complete: bool


def save_progress(
    folder: Path, provenance: Provenance, finished: Iterable[FinishedShard], *, complete: bool = False
) -> None:
    content = {"made_of": dict(provenance), "complete": complete, "finished": [asdict(f) for f in finished]}
    write_atomic(folder / "progress.json", json.dumps(content, indent=1) + "\n")


def load_progress(folder: Path, provenance: Provenance, restart: bool) -> list[FinishedShard]:
    """Returns the intact finished shards of an earlier run; none when there was no run or `restart` is set.

    A missing or damaged shard is dropped, together with all later shards of its split. Other leftovers of an
    interrupted run are deleted. Raises UserError, naming what changed, when the folder holds shards of a different
    provenance.
    """
    before = Progress([], complete=False) if restart else read_progress(folder, provenance)
    listed, intact = before.finished, list[FinishedShard]()
    for split in SPLITS:
        intact += takewhile(lambda f: _is_intact(folder, f.shard), (f for f in listed if f.shard.split == split))
    kept = {f"{name}.tmp" for finished in intact for name in finished.shard.files}
    for path in shard_files(folder, ".tmp"):
        if path.name not in kept:
            path.unlink()
    save_progress(folder, provenance, intact, complete=before.complete and intact == listed)
    return intact


def is_complete(folder: Path, provenance: Provenance) -> bool:
    """Whether the shards in the manifest are those of `provenance`, all of them. The folder may also hold the shards
    that an interrupted --restart was going to replace. Raises UserError as `read_progress` does."""
    progress = read_progress(folder, provenance)
    try:
        shards = read_manifest(folder).shards
    except UserError:  # none, or damaged
        return False
    return progress.complete and shards == [finished.shard for finished in progress.finished]


def shard_files(folder: Path, suffix: str = "") -> list[Path]:
    patterns = [f"{split}_{'[0-9]' * 5}.{kind}{suffix}" for split in SPLITS for kind in ("npy", "offsets")]
    return [path for pattern in patterns for path in folder.glob(pattern)]


def read_progress(folder: Path, provenance: Provenance) -> Progress:
    """Returns the finished shards of an earlier run. Raises UserError when their provenance is different."""
    path, has_shards = folder / "progress.json", (folder / "manifest.json").exists()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = dict(content["made_of"])
        finished = [FinishedShard(Shard(**f["shard"]), f["keys_sha256"]) for f in content["finished"]]
        complete = bool(content.get("complete", has_shards))  # not recorded before 0.3.0
    except FileNotFoundError:
        if has_shards:
            raise UserError(
                f"{folder}: holds shards but no progress.json that records how they were built: choose another "
                "folder, or replace them with --restart"
            ) from None
        return Progress([], complete=False)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}): start over with --restart") from error
    changes = describe_changes(recorded, provenance)
    if not changes:
        return Progress(finished, complete)
    if has_shards:
        raise UserError(
            f"{folder}: holds shards built with different settings: {changes}: choose another folder, or replace them "
            "with --restart"
        )
    if finished:
        raise UserError(
            f"{folder}: can't resume the interrupted run: {changes}: revert this, or start over with --restart"
        )
    return Progress([], complete=False)


def describe_changes(before: Provenance, provenance: Provenance) -> str:
    """Lists what changed, as "KEY changed from A to B, ..."; empty when nothing did."""
    now = json.loads(json.dumps(dict(provenance)))
    changed = [key for key in {**before, **now} if before.get(key, "absent") != now.get(key, "absent")]
    shown = [
        f"{key} changed from {before.get(key, 'absent')} to {now.get(key, 'absent')}" for key in changed[:MAX_CHANGES]
    ]
    return ", ".join(shown) + (f" and {len(changed) - MAX_CHANGES} more" if len(changed) > MAX_CHANGES else "")


def _is_intact(folder: Path, shard: Shard) -> bool:
    """Checks NAME.tmp, or NAME if the run was interrupted while it renamed its shards."""
    for name, sha256 in zip(shard.files, (shard.sha256, shard.offsets_sha256), strict=True):
        temporary = folder / f"{name}.tmp"
        path = temporary if temporary.exists() else folder / name
        if not path.is_file() or sha256_file(path) != sha256:
            return False
    return True


class FinishedDocuments:
    """Skips the documents that finished shards hold: the first documents of each split, verified by their keys."""

    def __init__(self, finished: Iterable[FinishedShard], progress: Callable[[int, int], None]) -> None:
        """`progress(bytes, tokens)` is called after each skipped shard."""
        self._remaining: dict[Split, deque[FinishedShard]] = {split: deque() for split in SPLITS}
        for f in finished:
            self._remaining[f.shard.split].append(f)
        self._skipped = dict.fromkeys(SPLITS, 0)
        self._keys = {split: hashlib.sha256() for split in SPLITS}
        self._progress = progress

    def unwritten(self, batch: DocumentBatch) -> Mask:
        """The mask of documents in no finished shard. Batches must come in order. Raises UserError at the end of a
        shard that was written from different documents."""
        mask = np.ones(len(batch), bool)
        for split, in_split in zip(SPLITS, (~batch.is_val, batch.is_val), strict=True):
            indices = np.flatnonzero(in_split)
            mask[indices[: self._skip(split, batch.keys[indices])]] = False
        return mask

    def _skip(self, split: Split, keys: npt.NDArray[np.void]) -> int:
        """How many of the split's next documents, with these keys, are in finished shards."""
        remaining, count = self._remaining[split], 0
        while remaining and count < len(keys):
            shard = remaining[0].shard
            in_shard = keys[count : count + shard.documents - self._skipped[split]]
            self._keys[split].update(in_shard.data)
            self._skipped[split] += len(in_shard)
            count += len(in_shard)
            if self._skipped[split] == shard.documents:
                if self._keys[split].hexdigest() != remaining[0].keys_sha256:
                    raise _different_documents(shard)
                remaining.popleft()
                self._skipped[split], self._keys[split] = 0, hashlib.sha256()
                self._progress(shard.bytes, shard.tokens)
        return count

    def check_exhausted(self) -> None:
        """Raises UserError when there were fewer documents than the finished shards hold."""
        for remaining in self._remaining.values():
            if remaining:
                raise _different_documents(remaining[0].shard)


def _different_documents(shard: Shard) -> UserError:
    return UserError(f"{shard.file}: an earlier run wrote this shard from other documents: start over with --restart")
