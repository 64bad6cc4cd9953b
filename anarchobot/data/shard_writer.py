"""Writes token shards as a stream to NAME.tmp, in memory that does not grow with the shard."""

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.data.document_batches import TokenizedBatch
from anarchobot.data.shards import SPLITS, Shard, Split
from anarchobot.storage.durable import fsync, sha256_file


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is complete on disk, and the sha256 over its documents' keys, which identifies its text."""

    shard: Shard
    keys_sha256: str


class ShardWriter:
    """Writes `train_00000.npy.tmp`, `train_00000.offsets.tmp` and so on, and the same for val.

    A shard ends with the document that brings it to `shard_tokens`; no document spans two shards. `finished` are the
    shards of an earlier run, after which writing resumes.
    """

    def __init__(
        self, folder: Path, dtype: npt.DTypeLike, shard_tokens: int, finished: Iterable[FinishedShard] = ()
    ) -> None:
        earlier = list(finished)
        self._splits = {
            split: _SplitWriter(folder, split, dtype, shard_tokens, [f for f in earlier if f.shard.split == split])
            for split in SPLITS
        }

    @property
    def finished(self) -> list[FinishedShard]:
        return [finished for writer in self._splits.values() for finished in writer.finished]

    def add(self, batch: TokenizedBatch) -> bool:
        """Returns whether this finished a shard."""
        before = len(self.finished)
        is_val = batch.documents.is_val
        self._splits["train"].add(batch.select(~is_val))
        if is_val.any():
            self._splits["val"].add(batch.select(is_val))
        return len(self.finished) > before

    def close(self) -> None:
        for writer in self._splits.values():
            writer.close()

    def abort(self) -> None:
        """Deletes the unfinished shards; finished shards stay."""
        for writer in self._splits.values():
            writer.abort()


class _SplitWriter:
    def __init__(
        self, folder: Path, split: Split, dtype: npt.DTypeLike, shard_tokens: int, finished: list[FinishedShard]
    ) -> None:
        self.finished = finished
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._files: list[NpyStream] = []  # ids and offsets of the current shard

    def add(self, batch: TokenizedBatch) -> None:
        ends = np.cumsum(batch.lengths)
        first = start = 0
        while first < len(ends):
            if not self._files:
                self._open()
            full = int(np.searchsorted(ends, start + self._shard_tokens - self._tokens))
            last = min(full + 1, len(ends))
            stop = int(ends[last - 1])
            self._files[0].append(batch.ids[start:stop])
            self._files[1].append((ends[first:last] + (self._tokens - start)).astype(np.uint64))
            self._tokens += stop - start
            self._documents += last - first
            self._bytes += int(batch.documents.sizes[first:last].sum())
            self._keys.update(batch.documents.keys[first:last].data)
            first, start = last, stop
            if self._tokens >= self._shard_tokens:
                self.close()

    def close(self) -> None:
        if not self._files:
            return
        sha256, offsets_sha256 = (file.close() for file in self._files)
        self._files = []
        file = f"{self._name}.npy"
        shard = Shard(file, self._split, self._tokens, self._documents, self._bytes, sha256, offsets_sha256)
        self.finished.append(FinishedShard(shard, self._keys.hexdigest()))

    def abort(self) -> None:
        for file in self._files:
            file.abort()

    def _open(self) -> None:
        self._name = f"{self._split}_{len(self.finished):05d}"
        self._tokens = self._documents = self._bytes = 0
        self._keys = hashlib.sha256()
        self._files.append(NpyStream(self._folder / f"{self._name}.npy.tmp", self._dtype))
        self._files.append(NpyStream(self._folder / f"{self._name}.offsets.tmp", np.uint64))
        self._files[1].append(np.zeros(1, np.uint64))


class NpyStream:
    """A growing one-dimensional `.npy` file, byte-identical to np.save. numpy pads the header so that the length can
    be filled in at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._path, self._dtype, self._length = path, np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, values: npt.NDArray[Any]) -> None:
        """`values` must have the stream's dtype."""
        self._file.write(values.data)
        self._length += len(values)

    def close(self) -> str:
        """Flushes the file to disk and returns its sha256."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        fsync(self._file.fileno())
        self._file.close()
        return sha256_file(self._path)

    def abort(self) -> None:
        with suppress(OSError):  # closing may flush to a full disk again
            self._file.close()
        self._path.unlink(missing_ok=True)

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._length,)}
        np.lib.format.write_array_header_1_0(self._file, header)
