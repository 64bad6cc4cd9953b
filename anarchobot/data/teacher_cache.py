"""A teacher's distribution at every scored position of training windows, cached on disk (model/distillation.py).

A teacher's probabilities depend on the tokens before a position, so they are cached by window: the student reads the
same windows in every epoch, whatever the order. Records of the positions, in the order of the windows, are in two files
of a fixed size: `ids.bin`, [k], and `log_probs.bin`, [k + 1], float16. The files are sparse: windows that no run has
read take no space. `checksums.npy` holds the CRC-32 of each window's records, 0 if there are none. It also tells what a
crash left incomplete.

Shapes: n windows of L tokens, k = distillation.top_k.
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.windows import Batch, Ints, Windows, expand_ranges
from anarchobot.storage.durable import write_atomic

IDS, LOG_PROBS, CHECKSUMS = "ids.bin", "log_probs.bin", "checksums.npy"
BLOCK = 1024  # windows read at once


@dataclass(frozen=True)
class TeacherBatch(Batch):
    """With a teacher's distribution: `teacher_ids`, integers [..., L, k], and float16 `teacher_log_probs`
    [..., L, k + 1]; zero where there is no target."""

    teacher_ids: npt.NDArray[Any] = field(kw_only=True)
    teacher_log_probs: npt.NDArray[np.float16] = field(kw_only=True)


def record_bytes(top_k: int, vocab_size: int) -> int:
    """The size of a position in the cache."""
    return top_k * _id_type(vocab_size).itemsize + 2 * (top_k + 1)


def _id_type(vocab_size: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def with_uniform_teacher(batch: Batch, top_k: int) -> TeacherBatch:
    """For measurements of a step."""
    shape = batch.targets.shape
    ids = np.broadcast_to(np.arange(top_k, dtype=np.uint32), (*shape, top_k))
    log_probs = np.full((*shape, top_k + 1), -np.log(top_k + 1), np.float16)
    return TeacherBatch(batch.inputs, batch.targets, batch.segments, teacher_ids=ids, teacher_log_probs=log_probs)


class TeacherCache:
    """The records in `folder`, which exists, of `windows`. Only windows that `missing` has checked or `write` has
    written can be read."""

    def __init__(self, folder: Path, windows: Windows, top_k: int, vocab_size: int) -> None:
        counts, lengths = (np.concatenate(parts) for parts in zip(*_positions(windows), strict=True))
        self._starts = np.cumsum(np.concatenate([[0], counts]))  # of each window's records
        self._lengths = lengths
        self._folder, self._record_bytes = folder, record_bytes(top_k, vocab_size)
        records = int(self._starts[-1])
        self._ids = _open(folder / IDS, _id_type(vocab_size), (records, top_k))
        self._log_probs = _open(folder / LOG_PROBS, np.dtype(np.float16), (records, top_k + 1))
        self._checksums = _read_checksums(folder / CHECKSUMS, windows.count)
        self._usable = np.zeros(windows.count, bool)

    def missing(self, windows: Ints) -> Ints:
        """Those of `windows` that have no intact records, longest first: batches of them have little padding."""
        self._usable[windows] = [self._checksums[w] == self._checksum(w) for w in windows.tolist()]
        absent = windows[~self._usable[windows]]
        return absent[np.argsort(-self._lengths[absent], kind="stable")]

    def size(self, windows: Ints) -> int:
        """The bytes of the records of `windows`."""
        return int((self._starts[windows + 1] - self._starts[windows]).sum()) * self._record_bytes

    def write(self, windows: Ints, ids: npt.NDArray[Any], log_probs: npt.NDArray[np.float16]) -> None:
        """Writes the records of `windows`, one after the other. They are valid after `save`."""
        positions = self._records(windows)
        self._ids[positions], self._log_probs[positions] = ids, log_probs
        self._checksums[windows] = [self._checksum(w) for w in windows.tolist()]
        self._usable[windows] = True

    def save(self) -> None:
        self._ids.flush()
        self._log_probs.flush()
        content = io.BytesIO()
        np.save(content, self._checksums)
        write_atomic(self._folder / CHECKSUMS, content.getvalue())

    def read(self, windows: Ints, batch: Batch) -> TeacherBatch:
        """`batch`, which holds `windows`, with their records. Raises UserError for a window without usable records."""
        unusable = windows[~self._usable[windows]]
        if unusable.size:
            raise UserError(
                f"{self._folder}: no record of training sequence {unusable[0]}, which the run reached after it went "
                "back to an earlier checkpoint: resume it with --resume-from auto, which adds it"
            )
        positions, scored = self._records(windows), batch.targets >= 0
        ids = np.zeros((*batch.targets.shape, self._ids.shape[1]), self._ids.dtype)
        log_probs = np.zeros((*batch.targets.shape, self._log_probs.shape[1]), np.float16)
        ids[scored], log_probs[scored] = self._ids[positions], self._log_probs[positions]
        return TeacherBatch(batch.inputs, batch.targets, batch.segments, teacher_ids=ids, teacher_log_probs=log_probs)

    def _records(self, windows: Ints) -> Ints:
        return expand_ranges(self._starts[windows], self._starts[windows + 1])[1]

    def _checksum(self, window: int) -> int:
        records = slice(self._starts[window], self._starts[window + 1])
        return zlib.crc32(self._log_probs[records].data, zlib.crc32(self._ids[records].data)) or 1


class TeacherWindows:
    """Windows with the records of `cache`, which is set before training, from window `first` on."""

    cache: TeacherCache | None = None

    def __init__(self, windows: Windows, first: int) -> None:
        self.count, self._windows, self._first = windows.count, windows, first

    def rows(self, indices: Ints) -> Batch:
        batch = self._windows.rows(indices)
        return batch if self.cache is None else self.cache.read(self._first + indices, batch)


def _positions(windows: Windows) -> Iterator[tuple[Ints, Ints]]:
    """The number of scored positions of each window, and its length up to the last of them."""
    for start in range(0, windows.count, BLOCK):
        scored = windows.rows(np.arange(start, min(start + BLOCK, windows.count))).targets >= 0
        yield np.count_nonzero(scored, axis=1), scored.shape[1] - np.argmax(scored[:, ::-1], axis=1)


def _open(path: Path, dtype: np.dtype[Any], shape: tuple[int, int]) -> "np.memmap[Any, np.dtype[Any]]":
    """Maps a file, which is extended with zeros to its size."""
    with path.open("ab") as file:
        file.truncate(dtype.itemsize * shape[0] * shape[1])
    return np.memmap(path, dtype, "r+", shape=shape)


def _read_checksums(path: Path, count: int) -> npt.NDArray[np.uint32]:
    try:
        checksums = np.load(path, allow_pickle=False)
        if checksums.dtype == np.uint32 and checksums.shape == (count,):
            return np.array(checksums)
    except (OSError, ValueError, EOFError):
        pass
    return np.zeros(count, np.uint32)
