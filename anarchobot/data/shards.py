"""Token shards: flat `.npy` arrays, and the manifest that says what they are.

DIR/train_00000.npy ...      one-dimensional uint16 or uint32; every document is followed by the end-of-document id
DIR/train_00000.offsets ...  .npy too, uint64 [documents + 1]: where each document begins, then the shard's length
DIR/val_00000.npy ...        the documents held out
DIR/manifest.json            written last: without it there are no shards
DIR/tokenizer.model          the tokenizer that made them (or tokenizer.json, or vocab.json and merges.txt)
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.storage.durable import SEAL, read_sealed, sha256_file, write_sealed

FORMAT_VERSION = 1
DTYPES = ("uint16", "uint32")
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
Split = Literal["train", "val"]
Stretch = memoryview  # of ids, as wide as in the shards


@dataclass(frozen=True)
class Shard:
    """One file of the manifest's list. `bytes` counts the raw UTF-8 text behind the tokens."""

    file: str
    split: Split
    tokens: int
    documents: int
    bytes: int
    sha256: str
    offsets_sha256: str

    @property
    def files(self) -> tuple[str, str]:
        """The ids and the offsets."""
        return self.file, self.file.removesuffix(".npy") + ".offsets"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `tokenizer` holds `name`, `file` and `sha256`; `counts` is documents.Counts."""

    tokenizer: dict[str, str]
    vocab_size: int
    dtype: str
    eod_id: int
    seed: int
    counts: dict[str, int]
    shards: list[Shard]
    format_version: int = FORMAT_VERSION

    def of(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.of(split))

    def digest(self) -> str:
        """sha256 of the manifest's content: a run is bound to the shards it began with."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_sealed(folder / "manifest.json", json.loads(manifest.to_json()))


def read_manifest(folder: str | Path) -> Manifest:
    """Raises UserError when there are no shards here, or the manifest is none that this version reads."""
    path = Path(folder) / "manifest.json"
    try:
        values: dict[str, Any] = json.loads(path.read_bytes())
        if SEAL in values:  # one made by another program may have none
            values = read_sealed(path)
        if values.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format {values.get('format_version')}, expected {FORMAT_VERSION}: pretokenize again"
            )
        if values["dtype"] not in DTYPES:
            raise ValueError(f"dtype {values['dtype']}")
        values["shards"] = [Shard(**shard) for shard in values["shards"]]
        return Manifest(**values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder}: no token shards here (no manifest.json): run `anarchobot pretokenize`") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}): run `anarchobot pretokenize` again") from error


class TokenStream:
    """The shards of one split as one long sequence of ids, memory-mapped: no copy of the corpus is made."""

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self._listed = self.manifest.of(split)
        self._shards = [_open(self.folder / s.file, self.manifest.dtype, s.tokens).data for s in self._listed]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.tokens = int(self._starts[-1])

    def read(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Ids [start, stop) as int32, across shard borders. Raises UserError for an id beyond the vocabulary."""
        return self.joined([self._read(start, stop)])

    def rows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int32]:
        """Ids [start, start + length) of each of `starts`: int32 [n, length]. Raises UserError as `read` does."""
        return self.joined(self.stretches(starts, starts + length)).reshape(-1, length)

    def stretches(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> list[Stretch]:
        """Ids [starts[i], stops[i]) as they lie in the shards, for `joined`. Before the stream's start is an end
        of document."""
        shards = np.maximum(np.searchsorted(self._starts, starts, side="right") - 1, 0)
        firsts = starts - self._starts[shards]
        across = (stops > self._starts[shards + 1]) | (firsts < 0)
        found: list[Stretch] = [
            self._shards[shard][first:last]
            for shard, first, last in zip(
                shards.tolist(), firsts.tolist(), (firsts + (stops - starts)).tolist(), strict=True
            )
        ]
        for i in np.flatnonzero(across).tolist():
            found[i] = self._read(int(starts[i]), int(stops[i]))
        return found

    def joined(self, stretches: Sequence[Stretch]) -> npt.NDArray[np.int32]:
        """The ids of all of them, one behind the other. Raises UserError as `read` does."""
        ids = np.frombuffer(b"".join(stretches), self.manifest.dtype)  # ten times as soon as numpy takes the slices
        largest = int(np.max(ids, initial=0))
        if largest >= self.manifest.vocab_size:
            raise UserError(
                f"{self.folder}: token id {largest} is beyond the vocabulary of {self.manifest.vocab_size}: "
                "the shards are damaged: see `anarchobot shards verify`"
            )
        return ids.astype(np.int32)

    def _read(self, start: int, stop: int) -> Stretch:
        before = np.full(max(0, -start), self.manifest.eod_id, self.manifest.dtype).data
        parts = zip(self._shards, self._starts.tolist(), strict=False)
        return memoryview(b"".join([before, *(s[max(0, start - first) : max(0, stop - first)] for s, first in parts)]))

    def document_starts(self) -> npt.NDArray[np.int64]:
        """Where each document begins in the stream, then its length: int64 [documents + 1], increasing.

        Raises UserError when the offsets are damaged.
        """
        parts = [np.zeros(1, np.int64)]
        for shard, start in zip(self._listed, self._starts.tolist(), strict=False):
            parts.append(_offsets(self.folder, shard)[1:] + start)
        return np.concatenate(parts)


def _open(path: Path, dtype: str, length: int) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{path}: the manifest lists this shard, but it is missing: pretokenize again") from error
    except Exception as error:  # a damaged header is Python text that may fail in any way
        raise UserError(f"{path}: damaged ({error}): pretokenize again") from error
    if array.shape != (length,) or array.dtype != dtype:
        raise UserError(
            f"{path}: holds {array.dtype} {array.shape}, the manifest says {dtype} ({length},): pretokenize again"
        )
    return array.view(np.ndarray)  # slices of a plain array are cheaper than of a memmap


def _offsets(folder: Path, shard: Shard) -> npt.NDArray[np.int64]:
    path = folder / shard.files[1]
    offsets = _open(path, "uint64", shard.documents + 1).astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != shard.tokens or (np.diff(offsets) <= 0).any():
        raise UserError(f"{path}: damaged (not increasing from 0 to {shard.tokens}): pretokenize again")
    return offsets


def length_histogram(folder: str | Path) -> list[tuple[int, int]]:
    """(n, documents of n to 2 n - 1 tokens) for n = 1, 2, 4 ... up to the longest; the end counts as a token."""
    streams = [TokenStream(folder, split) for split in SPLITS]
    lengths = np.concatenate([np.diff(stream.document_starts()) for stream in streams])
    powers = np.frexp(lengths)[1] - 1  # exactly the logarithm, rounded down
    return [(2**power, count) for power, count in enumerate(np.bincount(powers).tolist())]


def first_documents(stream: TokenStream, documents: int, tokens: int) -> Iterator[npt.NDArray[np.int32]]:
    """The first ids of the first documents, `tokens` of each at most, without the end of document."""
    starts = stream.document_starts()[: documents + 1].tolist()
    for start, end in pairwise(starts):
        yield stream.read(start, min(end - 1, start + tokens))


def verify(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Re-reads every file of every shard: yields (file, what is wrong, or nothing when it is good)."""
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        ids, offsets = (_problem(check, folder, shard, manifest) for check in (_check_ids, _check_offsets))
        if not ids and not offsets:
            offsets = _problem(_check_ends, folder, shard, manifest)
        yield from zip(shard.files, (ids, offsets), strict=True)


def find_modified_file(folder: str | Path) -> str | None:
    """The first file whose content is not what was written. Only digests are compared, so that a thread may do it
    beside others: reading numpy's headers is Python's parser, which in Python 3.11 fails at times when two threads use
    it at once (CPython's issue 106905). Raises OSError for one that can't be read."""
    for shard in read_manifest(folder).shards:
        for file, digest in zip(shard.files, (shard.sha256, shard.offsets_sha256), strict=True):
            if sha256_file(Path(folder) / file) != digest:
                return file
    return None


def _problem(check: Callable[[Path, Shard, Manifest], None], folder: str | Path, shard: Shard, told: Manifest) -> str:
    try:
        check(Path(folder), shard, told)
    except UserError as error:
        return str(error).partition(": ")[2]
    return ""


def _check_ids(folder: Path, shard: Shard, manifest: Manifest) -> None:
    path = folder / shard.file
    array = _open(path, manifest.dtype, shard.tokens)
    _check_content(path, shard.sha256)
    if int(np.max(array, initial=0)) >= manifest.vocab_size:
        raise UserError(f"{path}: token id {array.max()} is beyond the vocabulary of {manifest.vocab_size}")


def _check_offsets(folder: Path, shard: Shard, manifest: Manifest) -> None:
    _offsets(folder, shard)
    _check_content(folder / shard.files[1], shard.offsets_sha256)


def _check_ends(folder: Path, shard: Shard, manifest: Manifest) -> None:
    is_end = _open(folder / shard.file, manifest.dtype, shard.tokens) == manifest.eod_id
    if not is_end[_offsets(folder, shard)[1:] - 1].all() or np.count_nonzero(is_end) != shard.documents:
        raise UserError(f"{folder / shard.files[1]}: not where the ends of documents are in {shard.file}")


def _check_content(path: Path, sha256: str) -> None:
    if sha256_file(path) != sha256:
        raise UserError(f"{path}: its content is not what was written (sha256 differs)")


class BackgroundVerifier:
    """Begins at once; `problem` says what is wrong with the first damaged file, as soon as it is found."""

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.problem: str | None = None
        self._folders = list(folders)
        # A daemon: the end of a run does not wait for it.
        threading.Thread(target=self._run, name="shard contents", daemon=True).start()

    def _run(self) -> None:
        try:
            for folder in self._folders:
                if (file := find_modified_file(folder)) is not None:
                    self.problem = f"{Path(folder) / file}: its content is not what was written: pretokenize again"
                    return
        except (UserError, OSError) as error:
            self.problem = str(error)
