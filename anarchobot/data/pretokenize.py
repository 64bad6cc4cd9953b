"""Documents in, shards out: duplicates dropped, a validation split held out, tokens written, all of it counted.

The same input gives the same bytes, however many threads tokenise.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.documents import Counts, Document
from anarchobot.data.shards import SPLITS, Manifest, Shard, Split, sha256_file, write_manifest
from anarchobot.data.tokenizer import Ids, Tokenizer, copy_beside, digest

SHARD_TOKENS = 2**26  # 128 MiB of uint16
UNIT_CHARS = 2**20  # text a tokenising thread takes at a time


@dataclass(frozen=True)
class Piece:
    """A document, or the train or val part of one, on its way to a shard."""

    split: Split
    text: str


def pretokenize(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    counts: Counts,
    val_fraction: float,
    num_workers: int,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] = lambda size, tokens: None,
) -> Manifest:
    """Writes the shards of `documents` and their manifest into `folder`; older shards there are replaced, once all the
    new ones are written.

    `progress(bytes, tokens)` is called after every unit of about 1 MB. Raises UserError when no document is left.
    """
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    _remove(_shard_files(out, ".tmp"))  # of a run that was killed
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    writers = {split: _ShardWriter(out, split, np.dtype(dtype), shard_tokens, tokenizer.eod_id) for split in SPLITS}
    pieces = _split(_unique(documents, counts), val_fraction)
    try:
        for unit, ids in _tokenise(pieces, tokenizer, num_workers):
            size = tokens = 0
            for piece, array in zip(unit, ids, strict=True):
                length = len(piece.text.encode())
                writers[piece.split].add(array, length)
                size, tokens = size + length, tokens + len(array) + 1
            progress(size, tokens)
        shards = [shard for split in SPLITS for shard in writers[split].close()]
        if not shards:
            raise UserError(f"{out}: no document is left to write ({_left_out(counts)})")
    except BaseException:
        _remove(_shard_files(out, ".tmp"))
        raise
    (out / "manifest.json").unlink(missing_ok=True)  # half-replaced shards must not pass for whole ones
    _remove(_shard_files(out))
    for shard in shards:
        (out / f"{shard.file}.tmp").rename(out / shard.file)
    name = copy_beside(tokenizer, out)
    manifest = Manifest(
        tokenizer={"name": tokenizer.files[0].name, "file": name, "sha256": digest(tokenizer)},
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        eod_id=tokenizer.eod_id,
        seed=seed,
        counts=counts.as_manifest(),
        shards=shards,
    )
    write_manifest(out, manifest)
    return manifest


def _left_out(counts: Counts) -> str:
    said = f"read {counts.read}, broken {counts.broken}, filtered {counts.filtered}, duplicates {counts.duplicates}"
    return f"{said}; first: {counts.first_broken}" if counts.first_broken else said


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink()


def _shard_files(folder: Path, suffix: str = "") -> list[Path]:
    return [path for split in SPLITS for path in folder.glob(f"{split}_{'[0-9]' * 5}.npy{suffix}")]


def _unique(documents: Iterable[Document], counts: Counts) -> Iterator[tuple[Document, bytes]]:
    seen: set[bytes] = set()
    for document in documents:
        key = hashlib.sha256(document.text.encode()).digest()[:16]
        if key in seen:
            counts.duplicates += 1
        else:
            seen.add(key)
            counts.kept += 1
            yield document, key


def _split(documents: Iterable[tuple[Document, bytes]], val_fraction: float) -> Iterator[Piece]:
    """Train or val by the document's hash, so that adding documents moves none; a long text file gives its tail."""
    for document, key in documents:
        text = document.text
        if document.may_cut and val_fraction:
            cut = _cut(text, val_fraction)
            yield Piece("train", text[:cut])
            yield Piece("val", text[cut:])
            continue
        held_out = int.from_bytes(key[:8], "big") < val_fraction * 2**64
        yield Piece("val" if held_out else "train", text)


def _cut(text: str, val_fraction: float) -> int:
    """Where the tail for validation begins: where a line or word starts, if one is near: at most its share before."""
    cut = max(1, min(int(len(text) * (1 - val_fraction)), len(text) - 1))
    near = max(0, 2 * cut - len(text))
    return text.rfind("\n", near, cut) + 1 or text.rfind(" ", near, cut) + 1 or cut


def _tokenise(pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[tuple[list[Piece], list[Ids]]]:
    """Units in their order. The libraries let go of the interpreter while they work, so threads are enough; at most
    two units a worker wait, so memory is bounded."""
    waiting: deque[tuple[list[Piece], Future[list[Ids]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for unit in _units(pieces):
            waiting.append((unit, pool.submit(tokenizer.encode_batch, [piece.text for piece in unit])))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    unit: list[Piece] = []
    size = 0
    for piece in pieces:
        unit.append(piece)
        size += len(piece.text)
        if size >= UNIT_CHARS:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


class _ShardWriter:
    """Gathers one split's tokens and writes a shard, to NAME.tmp, whenever enough are there."""

    def __init__(self, folder: Path, split: Split, dtype: np.dtype[np.unsignedinteger], size: int, eod_id: int) -> None:
        self._folder, self._split, self._dtype, self._size = folder, split, dtype, size
        self._eod = np.array([eod_id], dtype)
        self._parts: list[npt.NDArray[np.unsignedinteger]] = []
        self._tokens = self._documents = self._bytes = 0
        self._done: list[Shard] = []

    def add(self, ids: Ids, size: int) -> None:
        self._parts += [ids.astype(self._dtype), self._eod]
        self._tokens += len(ids) + 1
        self._documents += 1
        self._bytes += size
        if self._tokens >= self._size:  # a document is never spread over two shards
            self._write()

    def close(self) -> list[Shard]:
        if self._tokens:
            self._write()
        return self._done

    def _write(self) -> None:
        name = f"{self._split}_{len(self._done):05d}.npy"
        beside = self._folder / f"{name}.tmp"
        with beside.open("wb") as file:
            np.save(file, np.concatenate(self._parts), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        sha = sha256_file(beside)
        self._done.append(Shard(name, self._split, self._tokens, self._documents, self._bytes, sha))
        self._parts, self._tokens, self._documents, self._bytes = [], 0, 0, 0
