"""Token shards: flat `.npy` arrays, and the manifest that says what they are.

DIR/train_00000.npy ...  one-dimensional uint16 or uint32; every document is followed by the end-of-document id
DIR/val_00000.npy ...    the documents held out
DIR/manifest.json        written last: without it there are no shards
DIR/tokenizer.model      the tokenizer that made them (or tokenizer.json, or vocab.json and merges.txt)
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError

FORMAT_VERSION = 1
DTYPES = ("uint16", "uint32")
SPLITS: tuple[Literal["train", "val"], ...] = ("train", "val")
Split = Literal["train", "val"]


@dataclass(frozen=True)
class Shard:
    """One file of the manifest's list. `bytes` counts the raw UTF-8 text behind the tokens."""

    file: str
    split: Split
    tokens: int
    documents: int
    bytes: int
    sha256: str


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

    def bytes_per_token(self, split: Split) -> float:
        """Bytes of raw text behind a token: turns nats per token into bits per byte."""
        return sum(shard.bytes for shard in self.of(split)) / max(1, self.tokens(split))

    def digest(self) -> str:
        """sha256 of the manifest's content: a run is bound to the shards it began with."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes beside, flushes, renames: a manifest is whole or not there."""
    beside = folder / "manifest.json.tmp"
    with beside.open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    beside.rename(folder / "manifest.json")


def read_manifest(folder: str | Path) -> Manifest:
    """Raises UserError when there are no shards here, or the manifest is none that this version reads."""
    path = Path(folder) / "manifest.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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
        self._shards = [_open(self.folder / s.file, s, self.manifest.dtype) for s in self.manifest.of(split)]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self.tokens = int(self._starts[-1])

    def read(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Ids [start, stop) as int32, across shard borders. Raises UserError for an id beyond the vocabulary."""
        out = np.empty(stop - start, np.int32)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = start
        while done < stop:
            first = int(self._starts[shard])
            end = min(stop, int(self._starts[shard + 1]))
            out[done - start : end - start] = self._shards[shard][done - first : end - first]
            done, shard = end, shard + 1
        largest = int(out.view(np.uint32).max(initial=0))  # seen as it was stored: no id is negative
        if largest >= self.manifest.vocab_size:
            raise UserError(
                f"{self.folder}: token id {largest} is beyond the vocabulary of {self.manifest.vocab_size}: "
                "the shards are damaged: see `anarchobot shards verify`"
            )
        return out


def _open(path: Path, shard: Shard, dtype: str) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{path}: the manifest lists this shard, but it is missing: pretokenize again") from error
    except Exception as error:  # a damaged header is Python text that may fail in any way
        raise UserError(f"{path}: damaged ({error}): pretokenize again") from error
    if array.shape != (shard.tokens,) or array.dtype != dtype:
        raise UserError(
            f"{path}: holds {array.dtype} {array.shape}, the manifest says {dtype} ({shard.tokens},): pretokenize again"
        )
    return array.view(np.ndarray)  # slices of a plain array are cheaper than of a memmap


def verify(folder: str | Path) -> Iterator[tuple[str, str]]:
    """Re-reads every shard: yields (file, what is wrong, or nothing when it is good)."""
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        path = Path(folder) / shard.file
        try:
            array = _open(path, shard, manifest.dtype)
        except UserError as error:
            yield shard.file, str(error).partition(": ")[2]
            continue
        if sha256_file(path) != shard.sha256:
            yield shard.file, "its content is not what was written (sha256 differs)"
        elif int(array.max(initial=0)) >= manifest.vocab_size:
            yield shard.file, f"token id {array.max()} is beyond the vocabulary of {manifest.vocab_size}"
        else:
            yield shard.file, ""


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
