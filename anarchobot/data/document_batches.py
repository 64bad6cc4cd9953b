"""Documents to pieces on their way to a shard: exact duplicates dropped, a validation split held out. In units of about
256 kB, column by column: what Python does once for each document would cost as much as a fast engine's work on it."""

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.duplicates import Seen
from anarchobot.data.sources.documents import Document, DocumentCounts
from anarchobot.tokenizers.tokenizer import Tokenizer

UNIT_CHARS = 2**20  # text that is tokenised by one call
KEY = np.dtype("V32")

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pieces:
    """n documents in a row, or the train and val part of a long one."""

    texts: list[str]  # none where they are tokens already
    sizes: npt.NDArray[np.int64]  # bytes of UTF-8
    keys: npt.NDArray[np.void]  # sha256 of the whole document
    is_val: Mask
    is_tail: Mask  # the val part of the document whose train part is the piece before

    def __len__(self) -> int:
        return len(self.sizes)

    def only(self, wanted: Mask) -> "Pieces":
        if wanted.all():
            return self
        texts = list(compress(self.texts, wanted))
        return Pieces(texts, self.sizes[wanted], self.keys[wanted], self.is_val[wanted], self.is_tail[wanted])


def pieces(documents: Iterable[Document], counts: DocumentCounts, dedup: bool, val_fraction: float) -> Iterator[Pieces]:
    """In the order of the documents. Train or val by the document's hash, so that adding documents moves none; a long
    text file gives its tail."""
    seen = Seen()
    held_out = np.uint64(math.ceil(val_fraction * 2**64))
    for texts, splittable in _units(documents):
        unit, numbers = _hashed(texts, held_out)
        if dedup:
            new = np.array(seen.add(numbers[:, 1].tolist()), bool)
            counts.duplicates += len(unit) - int(np.count_nonzero(new))
            unit = unit.only(new)
        counts.kept += len(unit)
        if len(unit):
            yield _cut(unit, val_fraction) if splittable and val_fraction else unit


def _units(documents: Iterable[Document]) -> Iterator[tuple[list[str], bool]]:
    """Texts, and whether it is one that may be cut: such a one is long enough to be a unit of its own."""
    texts: list[str] = []
    size = 0
    for text, splittable in documents:
        if splittable and texts:
            yield texts, False
            texts, size = [], 0
        texts.append(text)
        size += len(text)
        if splittable or size >= UNIT_CHARS:
            yield texts, splittable
            texts, size = [], 0
    if texts:
        yield texts, False


def _hashed(texts: list[str], held_out: np.uint64) -> tuple[Pieces, npt.NDArray[np.uint64]]:
    """The unit, and each key as four numbers: [n, 4]."""
    raw = [text.encode() for text in texts]
    keys = np.frombuffer(b"".join([hashlib.sha256(text).digest() for text in raw]), KEY)
    numbers = numbers_of(keys)
    sizes = np.fromiter(map(len, raw), np.int64, len(raw))
    return Pieces(texts, sizes, keys, numbers[:, 0] < held_out, np.zeros(len(texts), bool)), numbers


def numbers_of(keys: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Each key as four numbers: [n, 4]."""
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1, 4)


def _cut(unit: Pieces, val_fraction: float) -> Pieces:
    """One long document's train and val part. The tail for validation begins where a line or word starts, if one is
    near: at most its share before."""
    (text,) = unit.texts
    at = max(1, min(int(len(text) * (1 - val_fraction)), len(text) - 1))
    near = max(0, 2 * at - len(text))
    at = text.rfind("\n", near, at) + 1 or text.rfind(" ", near, at) + 1 or at
    tail = len(text[at:].encode())
    is_tail = np.array([False, True])
    sizes = np.array([int(unit.sizes[0]) - tail, tail])
    return Pieces([text[:at], text[at:]], sizes, np.repeat(unit.keys, 2), is_tail, is_tail)


@dataclass(frozen=True)
class Encoded:
    """Pieces and their ids: flat, each piece's followed by the end of document, which `lengths` counts."""

    pieces: Pieces
    ids: npt.NDArray[Any]  # as wide as in the shards
    lengths: npt.NDArray[np.int64]

    def only(self, wanted: Mask) -> "Encoded":
        if wanted.all():
            return self
        return Encoded(self.pieces.only(wanted), self.ids[np.repeat(wanted, self.lengths)], self.lengths[wanted])


def id_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """Of the ids in shards."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")


def encoded(
    units: Iterable[Pieces], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger], workers: int
) -> Iterator[Encoded]:
    """One worker is this thread; several are threads of their own, for the tokenizers' libraries let go of the
    interpreter while they work. At most two units a worker are under way."""

    def encode(unit: Pieces) -> Encoded:
        return _encode(unit, tokenizer, dtype)

    if workers == 1:
        yield from map(encode, units)
        return
    waiting: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for unit in units:
            waiting.append(pool.submit(encode, unit))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(unit: Pieces, tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]) -> Encoded:
    """Raises UserError for an id beyond the vocabulary, which would be cut to another one in the shard."""
    arrays = tokenizer.encode_batch(unit.texts)
    eod = np.array([tokenizer.eod_id], np.int32)
    flat = np.concatenate([part for ids in arrays for part in (ids, eod)])
    largest = int(np.max(flat.view(np.uint32)))
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{tokenizer.files[0]}: gave the id {largest}, beyond its {tokenizer.vocab_size} tokens: "
            "set tokenizer.engine: reference"
        )
    lengths = np.fromiter(map(len, arrays), np.int64, len(unit)) + 1
    return Encoded(unit, flat.astype(dtype), lengths)
