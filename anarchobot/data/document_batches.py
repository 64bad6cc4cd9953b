"""Documents in batches of about a million characters: deduplicated, split into train and validation, tokenized.

Batches are stored column by column, because per-document Python work would cost as much as a fast tokenizer.
"""

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
from anarchobot.data.duplicates import KeySet
from anarchobot.data.sources.documents import Document, DocumentCounts
from anarchobot.tokenizers.tokenizer import Tokenizer

BATCH_CHARS = 2**20  # text per tokenizer call
KEY = np.dtype("V32")

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DocumentBatch:
    """n consecutive documents, or the train and validation parts of one long document."""

    texts: list[str]  # empty when the batch was read back as tokens
    sizes: npt.NDArray[np.int64]  # bytes of UTF-8
    keys: npt.NDArray[np.void]  # sha256 of the whole document
    is_val: Mask
    is_tail: Mask  # the validation part of the preceding document

    def __len__(self) -> int:
        return len(self.sizes)

    def select(self, mask: Mask) -> "DocumentBatch":
        if mask.all():
            return self
        texts = list(compress(self.texts, mask))
        return DocumentBatch(texts, self.sizes[mask], self.keys[mask], self.is_val[mask], self.is_tail[mask])


@dataclass(frozen=True)
class TokenizedBatch:
    """A batch and its token ids, flattened. Every document ends with the end-of-document id, included in `lengths`."""

    documents: DocumentBatch
    ids: npt.NDArray[Any]  # in the dtype of the shards
    lengths: npt.NDArray[np.int64]

    def select(self, mask: Mask) -> "TokenizedBatch":
        if mask.all():
            return self
        return TokenizedBatch(self.documents.select(mask), self.ids[np.repeat(mask, self.lengths)], self.lengths[mask])


def batch_documents(
    documents: Iterable[Document], counts: DocumentCounts, dedup: bool, val_fraction: float
) -> Iterator[DocumentBatch]:
    """Yields the documents in order, without exact duplicates.

    A document is assigned to train or validation by its hash, so adding documents does not move others. A long text
    file contributes its tail to validation instead.
    """
    seen = KeySet()
    val_threshold = np.uint64(math.ceil(val_fraction * 2**64))
    for texts, splittable in _group_texts(documents):
        batch, words = _hash_texts(texts, val_threshold)
        if dedup:
            new = np.array(seen.add(words[:, 1].tolist()), bool)
            counts.duplicates += len(batch) - int(np.count_nonzero(new))
            batch = batch.select(new)
        counts.kept += len(batch)
        if len(batch):
            yield _split_document(batch, val_fraction) if splittable and val_fraction else batch


def _group_texts(documents: Iterable[Document]) -> Iterator[tuple[list[str], bool]]:
    """Yields (texts, splittable). A splittable document is long enough to be a batch by itself."""
    texts: list[str] = []
    size = 0
    for text, splittable in documents:
        if splittable and texts:
            yield texts, False
            texts, size = [], 0
        texts.append(text)
        size += len(text)
        if splittable or size >= BATCH_CHARS:
            yield texts, splittable
            texts, size = [], 0
    if texts:
        yield texts, False


def _hash_texts(texts: list[str], val_threshold: np.uint64) -> tuple[DocumentBatch, npt.NDArray[np.uint64]]:
    """Returns the batch and `key_words` of its keys."""
    raw = [text.encode() for text in texts]
    keys = np.frombuffer(b"".join([hashlib.sha256(text).digest() for text in raw]), KEY)
    words = key_words(keys)
    sizes = np.fromiter(map(len, raw), np.int64, len(raw))
    return DocumentBatch(texts, sizes, keys, words[:, 0] < val_threshold, np.zeros(len(texts), bool)), words


def key_words(keys: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """Each 256-bit key as four integers: [n, 4]."""
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1, 4)


def _split_document(batch: DocumentBatch, val_fraction: float) -> DocumentBatch:
    """Splits one long document into its train and validation parts.

    The tail starts at the beginning of a line or word if there is one nearby, which may at most double the tail.
    """
    (text,) = batch.texts
    at = max(1, min(int(len(text) * (1 - val_fraction)), len(text) - 1))
    earliest = max(0, 2 * at - len(text))
    at = text.rfind("\n", earliest, at) + 1 or text.rfind(" ", earliest, at) + 1 or at
    tail = len(text[at:].encode())
    is_tail = np.array([False, True])
    sizes = np.array([int(batch.sizes[0]) - tail, tail])
    return DocumentBatch([text[:at], text[at:]], sizes, np.repeat(batch.keys, 2), is_tail, is_tail)


def id_dtype(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    """The dtype of token ids in shards."""
    return np.dtype("uint16" if tokenizer.vocab_size <= 2**16 else "uint32")


def tokenize_batches(
    batches: Iterable[DocumentBatch], tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger], workers: int
) -> Iterator[TokenizedBatch]:
    """Tokenizes on `workers` threads, preserving order, with at most two batches in flight per worker.

    One worker runs in the calling thread. Threads suffice because the tokenizer libraries release the GIL.
    """

    def tokenize(batch: DocumentBatch) -> TokenizedBatch:
        return _tokenize(batch, tokenizer, dtype)

    if workers == 1:
        yield from map(tokenize, batches)
        return
    pending: deque[Future[TokenizedBatch]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for batch in batches:
            pending.append(pool.submit(tokenize, batch))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tokenize(batch: DocumentBatch, tokenizer: Tokenizer, dtype: np.dtype[np.unsignedinteger]) -> TokenizedBatch:
    """Raises UserError for an id outside the vocabulary, which the shard's dtype could truncate to another id."""
    arrays = tokenizer.encode_batch(batch.texts)
    eod = np.array([tokenizer.eod_id], np.int32)
    flat = np.concatenate([part for ids in arrays for part in (ids, eod)])
    largest = int(np.max(flat.view(np.uint32)))
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{tokenizer.files[0]}: produced token id {largest}, outside its vocabulary of {tokenizer.vocab_size}: "
            "set tokenizer.engine: reference"
        )
    lengths = np.fromiter(map(len, arrays), np.int64, len(batch)) + 1
    return TokenizedBatch(batch, flat.astype(dtype), lengths)
