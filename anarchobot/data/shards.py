"""Token shards: flat `.npy` arrays of token ids and the manifest that describes them.

DIR/train_00000.npy ...      one-dimensional uint16 or uint32; every document ends with the end-of-document id
DIR/train_00000.offsets ...  also .npy, uint64 [documents + 1]: the start of each document, then the shard's length
DIR/val_00000.npy ...        the validation split
DIR/manifest.json            written last: without it, the folder holds no shards
DIR/tokenizer.model          the tokenizer (or tokenizer.json, or vocab.json and merges.txt)
"""

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from anarchobot.config.errors import UserError, first_problem
from anarchobot.storage.durable import CHECKSUM, parse_json, read_checksummed, sha256_file, write_checksummed
from anarchobot.storage.npz import read_header

FORMAT_VERSION = 1
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
Split = Literal["train", "val"]
Count = Annotated[int, Field(strict=True, ge=0, lt=2**62)]
_CONFIG = ConfigDict(extra="forbid")  # for pydantic, which checks a manifest that is read
RawIds = memoryview  # token ids in the dtype of the shards
PREFIX, PREFIX_ROWS = 16, 2**16  # tokens by which documents are looked up, and documents compared at once


@dataclass(frozen=True)
class Shard:
    """One entry of the manifest's list. `bytes` is the size of the raw UTF-8 text."""

    __pydantic_config__: ClassVar = _CONFIG
    file: Annotated[str, Field(pattern=r"^\w[\w.-]*\.npy$")]
    split: Split
    tokens: Count
    documents: Count
    bytes: Count
    sha256: str
    offsets_sha256: str

    @property
    def files(self) -> tuple[str, str]:
        """The names of the id file and the offset file."""
        return self.file, self.file.removesuffix(".npy") + ".offsets"


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`. `tokenizer`: name, file, sha256. `counts`: `DocumentCounts.as_manifest`."""

    __pydantic_config__: ClassVar = _CONFIG
    tokenizer: dict[str, str]
    vocab_size: Count
    dtype: Annotated[str, Field(pattern="^uint(16|32)$")]
    eod_id: Count
    seed: Annotated[int, Field(strict=True)]
    counts: dict[str, Count]
    shards: list[Shard]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if missing := {"name", "file", "sha256"} - set(self.tokenizer):
            raise ValueError(f"tokenizer without {min(missing)}")
        if not self.eod_id < self.vocab_size <= np.iinfo(self.dtype).max + 1:
            raise ValueError(f"eod_id {self.eod_id}, vocab_size {self.vocab_size} and dtype {self.dtype} disagree")

    def shards_in(self, split: Split) -> list[Shard]:
        return [shard for shard in self.shards if shard.split == split]

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards_in(split))

    def digest(self) -> str:
        """sha256 of the manifest. Resuming a run requires the same digest."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_checksummed(folder / "manifest.json", json.loads(manifest.to_json()))


def read_manifest(folder: str | Path) -> Manifest:
    """Raises UserError when the folder holds no shards, or the manifest is damaged or of another format version."""
    path = Path(folder) / "manifest.json"
    try:
        values: dict[str, Any] = parse_json(path.read_bytes())
        if CHECKSUM in values:  # absent when another program wrote the manifest
            values = read_checksummed(path)
        if values.get("format_version") != FORMAT_VERSION:
            raise UserError(
                f"{path}: format {values.get('format_version')}, expected {FORMAT_VERSION}: pretokenize again"
            )
        return TypeAdapter(Manifest).validate_python(values)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{folder}: no token shards here (no manifest.json): run `anarchobot pretokenize`") from error
    except ValidationError as error:
        raise UserError(f"{path}: damaged ({first_problem(error)}): run `anarchobot pretokenize` again") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}): run `anarchobot pretokenize` again") from error


class TokenStream:
    """The shards of one split as one long sequence of token ids, memory-mapped and never copied as a whole."""

    def __init__(self, folder: str | Path, split: Split) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self._entries = self.manifest.shards_in(split)
        self._shards = [_open(self.folder / s.file, self.manifest.dtype, s.tokens).data for s in self._entries]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.tokens = int(self._starts[-1])

    def read(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Ids [start, stop) as int32, across shard boundaries. Raises UserError for an id outside the vocabulary."""
        return self.concatenate([self._read(start, stop)])

    def rows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int32]:
        """Ids [start, start + length) for each start: int32 [n, length]. Raises UserError as `read` does."""
        return self.concatenate(self.slices(starts, starts + length)).reshape(-1, length)

    def slices(self, starts: npt.NDArray[np.int64], stops: npt.NDArray[np.int64]) -> list[RawIds]:
        """Ids [starts[i], stops[i]) without conversion, for `concatenate`. Position -1 is an end-of-document id."""
        shards = np.maximum(np.searchsorted(self._starts, starts, side="right") - 1, 0)
        firsts = starts - self._starts[shards]
        crosses = (stops > self._starts[shards + 1]) | (firsts < 0)
        found: list[RawIds] = [
            self._shards[shard][first:last]
            for shard, first, last in zip(
                shards.tolist(), firsts.tolist(), (firsts + (stops - starts)).tolist(), strict=True
            )
        ]
        for i in np.flatnonzero(crosses).tolist():
            found[i] = self._read(int(starts[i]), int(stops[i]))
        return found

    def concatenate(self, slices: Sequence[RawIds]) -> npt.NDArray[np.int32]:
        """The ids of all slices in order. Raises UserError as `read` does."""
        ids = np.frombuffer(b"".join(slices), self.manifest.dtype)  # ten times faster than np.concatenate
        largest = int(np.max(ids, initial=0))
        if largest >= self.manifest.vocab_size:
            raise UserError(
                f"{self.folder}: token id {largest} is outside the vocabulary of {self.manifest.vocab_size}: "
                "the shards are damaged; check them with `anarchobot shards verify`"
            )
        return ids.astype(np.int32)

    def _read(self, start: int, stop: int) -> RawIds:
        before = np.full(max(0, -start), self.manifest.eod_id, self.manifest.dtype).data
        shards = zip(self._shards, self._starts.tolist(), strict=False)
        return memoryview(b"".join([before, *(s[max(0, start - first) : max(0, stop - first)] for s, first in shards)]))

    def document_starts(self) -> npt.NDArray[np.int64]:
        """The start of each document in the stream, then the stream's length: int64 [documents + 1], increasing.

        Raises UserError when the offsets are damaged.
        """
        starts = [np.zeros(1, np.int64)]
        for shard, start in zip(self._entries, self._starts.tolist(), strict=False):
            starts.append(_offsets(self.folder, shard)[1:] + start)
        return np.concatenate(starts)


def _open(path: Path, dtype: str, length: int) -> npt.NDArray[Any]:
    try:
        with path.open("rb") as file:
            read_header(file, path.stat().st_size)  # NumPy divides by a size of zero, which ends the process
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{path}: listed in the manifest, but missing: pretokenize again") from error
    except Exception as error:  # numpy evaluates the header as Python, so damage can raise anything
        raise UserError(f"{path}: damaged ({error}): pretokenize again") from error
    if array.shape != (length,) or array.dtype != dtype:
        raise UserError(
            f"{path}: holds {array.dtype} {array.shape}, the manifest says {dtype} ({length},): pretokenize again"
        )
    return array.view(np.ndarray)  # slicing a plain array is cheaper than slicing a memmap


def _offsets(folder: Path, shard: Shard) -> npt.NDArray[np.int64]:
    path = folder / shard.files[1]
    offsets = _open(path, "uint64", shard.documents + 1).astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != shard.tokens or (np.diff(offsets) <= 0).any():
        raise UserError(f"{path}: damaged (not increasing from 0 to {shard.tokens}): pretokenize again")
    return offsets


def length_histogram(folder: str | Path) -> list[tuple[int, int]]:
    """(n, documents with n to 2 n - 1 tokens) for n = 1, 2, 4, ..., counting the end-of-document token."""
    streams = [TokenStream(folder, split) for split in SPLITS]
    lengths = np.concatenate([np.diff(stream.document_starts()) for stream in streams])
    powers = np.frexp(lengths)[1] - 1  # floor of log2, exactly
    return [(2**power, count) for power, count in enumerate(np.bincount(powers).tolist())]


def first_documents(stream: TokenStream, documents: int, tokens: int) -> Iterator[npt.NDArray[np.int32]]:
    """The first `tokens` ids of each of the first documents, without the end-of-document id."""
    starts = stream.document_starts()[: documents + 1].tolist()
    for start, end in pairwise(starts):
        yield stream.read(start, min(end - 1, start + tokens))


def contains_documents(stream: TokenStream, documents: Sequence[npt.NDArray[np.int32]]) -> list[bool]:
    """Whether the stream contains each document [n]: as a whole or, since a long document may end in the other split,
    at least half of it from its start."""
    starts = stream.document_starts()
    lengths = np.diff(starts) - 1
    found = [False] * len(documents)
    by_prefix: dict[bytes, list[int]] = {}
    for i, ids in enumerate(documents):
        by_prefix.setdefault(ids[:PREFIX].tobytes(), []).append(i)
    for length in {min(len(ids), PREFIX) for ids in documents} - {0}:
        candidates = np.flatnonzero(lengths >= length if length == PREFIX else lengths == length)
        for chunk in np.array_split(candidates, len(candidates) // PREFIX_ROWS + 1):
            prefixes = stream.rows(starts[chunk], length)
            for document, prefix in zip(chunk.tolist(), prefixes, strict=True):
                for i in by_prefix.get(prefix.tobytes(), ()):
                    ids, size = documents[i], int(lengths[document])
                    if len(ids) <= 2 * size <= 2 * len(ids):
                        same = size if size == len(ids) else size - 2  # the last tokens before a cut may differ
                        start = int(starts[document])
                        found[i] |= bool((stream.read(start, start + same) == ids[:same]).all())
    return found


def verify(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Reads every file of every shard and yields (file, problem); the problem is empty for an intact file."""
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        ids, offsets = (_problem(check, folder, shard, manifest) for check in (_check_ids, _check_offsets))
        if not ids and not offsets:
            offsets = _problem(_check_ends, folder, shard, manifest)
        yield from zip(shard.files, (ids, offsets), strict=True)


def _problem(
    check: Callable[[Path, Shard, Manifest], None], folder: str | Path, shard: Shard, manifest: Manifest
) -> str:
    try:
        check(Path(folder), shard, manifest)
    except UserError as error:
        return str(error).partition(": ")[2]
    return ""


def _check_ids(folder: Path, shard: Shard, manifest: Manifest) -> None:
    path = folder / shard.file
    array = _open(path, manifest.dtype, shard.tokens)
    _check_sha256(path, shard.sha256)
    if int(np.max(array, initial=0)) >= manifest.vocab_size:
        raise UserError(f"{path}: token id {array.max()} is outside the vocabulary of {manifest.vocab_size}")


def _check_offsets(folder: Path, shard: Shard, manifest: Manifest) -> None:
    _offsets(folder, shard)
    _check_sha256(folder / shard.files[1], shard.offsets_sha256)


def _check_ends(folder: Path, shard: Shard, manifest: Manifest) -> None:
    is_end = _open(folder / shard.file, manifest.dtype, shard.tokens) == manifest.eod_id
    if not is_end[_offsets(folder, shard)[1:] - 1].all() or np.count_nonzero(is_end) != shard.documents:
        raise UserError(f"{folder / shard.files[1]}: does not match the ends of documents in {shard.file}")


def _check_sha256(path: Path, sha256: str) -> None:
    if sha256_file(path) != sha256:
        raise UserError(f"{path}: content differs from the manifest (sha256)")


class BackgroundVerifier:
    """Compares the sha256 of all shard files with the manifests in a daemon thread, while training runs.

    `problem` describes the first damaged file once it is found.

    Only digests are compared: numpy parses `.npy` headers with Python's parser, which in Python 3.11 can fail when two
    threads use it at once (CPython issue 106905).
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        self.problem: str | None = None
        self._folders = list(folders)
        threading.Thread(target=self._run, name="shard contents", daemon=True).start()

    def _run(self) -> None:
        try:
            for folder in self._folders:
                for shard in read_manifest(folder).shards:
                    for file, sha256 in zip(shard.files, (shard.sha256, shard.offsets_sha256), strict=True):
                        path = Path(folder) / file
                        if sha256_file(path) != sha256:
                            self.problem = f"{path}: content differs from the manifest (sha256): pretokenize again"
                            return
        except (UserError, OSError) as error:
            self.problem = str(error)
