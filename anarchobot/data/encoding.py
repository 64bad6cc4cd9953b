"""Pieces to token ids on all cores: in units of about 256 kB, their order kept, memory bounded."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.pieces import Piece
from anarchobot.data.tokenizer import Tokenizer

UNIT_CHARS = 2**18  # text that is tokenised by one call: it stays in the cache of a core


@dataclass(frozen=True)
class Encoded:
    """Pieces in a row and their ids: flat, each piece's followed by the end of document, which `lengths` counts."""

    pieces: list[Piece]
    ids: npt.NDArray[Any]  # as wide as in the shards
    lengths: npt.NDArray[np.int64]

    def only(self, wanted: Sequence[bool]) -> "Encoded":
        """Those of the pieces."""
        if all(wanted):
            return self
        chosen = np.array(wanted, bool)
        return Encoded(
            list(compress(self.pieces, wanted)), self.ids[np.repeat(chosen, self.lengths)], self.lengths[chosen]
        )


def encoded(
    pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger], workers: int
) -> Iterator[Encoded]:
    """One worker is this thread; several are threads of their own, for the tokenizers' libraries let go of the
    interpreter while they work. At most two units a worker are under way."""

    def encode(unit: list[Piece]) -> Encoded:
        return _encode(unit, tokenizer, dtype)

    if workers == 1:
        yield from map(encode, _units(pieces))
        return
    waiting: deque[Future[Encoded]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for unit in _units(pieces):
            waiting.append(pool.submit(encode, unit))
            if len(waiting) == 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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


def _encode(unit: list[Piece], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]) -> Encoded:
    """Raises UserError for an id beyond the vocabulary, which would be cut to another one in the shard."""
    arrays = tokenizer.encode_batch([piece.text for piece in unit])
    eod = np.array([tokenizer.eod_id], np.int32)
    flat = np.concatenate([part for _, ids in zip(unit, arrays, strict=True) for part in (ids, eod)])
    largest = int(np.max(flat.view(np.uint32)))
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{tokenizer.files[0]}: gave the id {largest}, beyond its {tokenizer.vocab_size} tokens: "
            "set tokenizer.engine: reference"
        )
    lengths = np.fromiter(map(len, arrays), np.int64, len(unit)) + 1
    return Encoded(unit, flat.astype(dtype), lengths)
