"""Pieces to token ids on all cores: their order kept, memory bounded."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.pieces import Mask, Pieces
from anarchobot.tokenizers.tokenizer import Tokenizer


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
