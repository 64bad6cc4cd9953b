"""Training sequences cut from a token stream, accessed by index. Shapes: n rows, L = seq_len tokens.

`data.pack` chooses between consecutive windows of the stream and documents packed into rows. Each token is a target
exactly once per epoch, predicted from the preceding token; a document's first token is predicted from an
end-of-document token, as in generation. (The very first token of a stream has no predecessor and is not a target.)
Positions that are not targets hold IGNORE.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.shards import TokenStream

IGNORE = -100  # an unscored target, as in PyTorch and Hugging Face

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """int32 [n, L], or [A, B, L] as micro-batches: `inputs`, `targets` (shifted by one; negative: not scored) and, with
    a document mask, `segments`: tokens attend only to tokens with the same segment id."""

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32] | None = None

    def micro_batches(self, count: int, size: int) -> Self:
        """[n, ...] as `count` micro-batches of `size` sequences."""
        return self.map(lambda x: np.ascontiguousarray(x).reshape(count, size, *x.shape[1:]))

    def rows(self, start: int, stop: int) -> Self:
        """Sequences [start, stop) of every micro-batch."""
        return self.map(lambda x: x[:, start:stop])

    def map(self, function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Self:
        return replace(self, **{name: function(x) for name, x in self.arrays()})

    def arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        """The fields that are set, by name."""
        for field in fields(self):
            if (x := getattr(self, field.name)) is not None:
                yield field.name, x


class Windows(Protocol):
    """`count` training sequences with random access: `rows` returns [n, L] for n indices."""

    count: int

    def rows(self, indices: Ints, /) -> Batch: ...


class ConcatWindows:
    """Concatenates several sets of windows."""

    def __init__(self, sets: Sequence[Windows]) -> None:
        self.count = sum(s.count for s in sets)
        self._sets, self._starts = sets, np.cumsum([0, *(s.count for s in sets)])

    def rows(self, indices: Ints) -> Batch:
        owners = np.searchsorted(self._starts[:-1], indices, side="right") - 1
        return gather(self._sets, owners, indices - self._starts[owners])


def gather(sets: Sequence[Windows], owners: Ints, indices: Ints) -> Batch:
    """Row i is window indices[i] of set owners[i]."""
    if (owners == owners[0]).all():
        return sets[int(owners[0])].rows(indices)
    parts = [(owners == s, sets[s].rows(indices[owners == s])) for s in np.unique(owners).tolist()]
    merged: Batch = parts[0][1].map(lambda x: np.empty((len(owners), *x.shape[1:]), x.dtype))
    for mask, rows in parts:
        for name, x in merged.arrays():
            x[mask] = getattr(rows, name)
    return merged


def open_windows(
    stream: TokenStream, seq_len: int, pack: Literal["stream", "documents"], document_mask: bool
) -> Windows:
    """Raises UserError when the stream is shorter than one sequence."""
    if stream.tokens <= seq_len:
        raise UserError(
            f"{stream.folder}: {stream.tokens} training tokens are fewer than one sequence of data.seq_len {seq_len}: "
            "add more text or set a smaller data.seq_len"
        )
    return (StreamWindows if pack == "stream" else PackedWindows)(stream, seq_len, document_mask)


class StreamWindows:
    """Window w is tokens [w L, w L + L + 1): the last target of a window is the first input of the next."""

    def __init__(self, stream: TokenStream, seq_len: int, document_mask: bool = False) -> None:
        self.count = -(-max(0, stream.tokens - 1) // seq_len)  # the last one may be short
        self._stream, self._seq_len = stream, seq_len
        self._documents = stream.document_starts() if document_mask else None

    def rows(self, indices: Ints) -> Batch:
        """Indices beyond the last window give empty rows."""
        starts = indices * self._seq_len
        missing = np.maximum(0, starts + self._seq_len + 1 - self._stream.tokens)
        if missing.any():
            return self._padded_rows(starts, missing)
        ids = self._stream.rows(starts, self._seq_len + 1)
        return Batch(ids[:, :-1], ids[:, 1:], self._segments(starts))

    def _padded_rows(self, starts: Ints, missing: Ints) -> Batch:
        inputs = np.zeros((len(starts), self._seq_len), np.int32)
        targets = np.full_like(inputs, IGNORE)
        for row, (start, n_missing) in enumerate(zip(starts.tolist(), missing.tolist(), strict=True)):
            scored = max(0, self._seq_len - n_missing)
            if scored:
                ids = self._stream.read(start, start + scored + 1)
                inputs[row, :scored], targets[row, :scored] = ids[:-1], ids[1:]
        return Batch(inputs, targets, self._segments(starts))

    def _segments(self, starts: Ints) -> npt.NDArray[np.int32] | None:
        if self._documents is None:
            return None
        first, end = np.searchsorted(self._documents, np.stack([starts + 1, starts + self._seq_len]))
        rows, documents = expand_ranges(first, end)  # documents that begin inside a window
        row_starts = np.arange(len(starts)) * self._seq_len
        inside = row_starts[rows] + self._documents[documents] - starts[rows]
        return _segments(np.sort(np.concatenate([row_starts, inside])), len(starts), self._seq_len)


class PackedWindows:
    """Rows of whole documents (best fit); only documents longer than a row are cut. Rows are padded with
    end-of-document tokens that are not targets."""

    def __init__(self, stream: TokenStream, seq_len: int, document_mask: bool = False) -> None:
        bounds = stream.document_starts()
        self._first, self._starts, self._ends = best_fit(bounds[:-1], bounds[1:], seq_len)
        self.count = len(self._first) - 1
        self._stream, self._seq_len, self._mask = stream, seq_len, document_mask
        self._padding = np.full(seq_len, stream.manifest.eod_id, stream.manifest.dtype).data

    def rows(self, indices: Ints) -> Batch:
        rows, chunks = expand_ranges(self._first[indices], self._first[indices + 1])
        starts, ends = self._starts[chunks], self._ends[chunks]
        targets, inputs = self._stream.slices(starts, ends), self._stream.slices(starts - 1, ends - 1)
        lengths = ends - starts
        used = np.bincount(rows, lengths, len(indices)).astype(np.int64)
        short = np.flatnonzero(used < self._seq_len)
        if len(short):
            at = np.searchsorted(rows, short, side="right")
            lengths = np.insert(lengths, at, self._seq_len - used[short])  # the padding is a separate document
            for index, row in zip(reversed(at.tolist()), reversed(short.tolist()), strict=True):
                padding = self._padding[used[row] :]
                targets.insert(index, padding)
                inputs.insert(index, padding)
        shape = len(indices), self._seq_len
        scored = self._stream.concatenate(targets).reshape(shape)
        for row in short.tolist():
            scored[row, used[row] :] = IGNORE
        segments = _segments(np.cumsum(lengths) - lengths, *shape) if self._mask else None
        return Batch(self._stream.concatenate(inputs).reshape(shape), scored, segments)


def _segments(document_starts: Ints, count: int, seq_len: int) -> npt.NDArray[np.int32]:
    """int32 [count, seq_len]: the index of each position's document within its row. `document_starts` are sorted
    positions in the flattened rows and include the start of every row."""
    rows = document_starts // seq_len
    indices = np.arange(len(document_starts)) - np.searchsorted(rows, rows)
    ends = np.append(document_starts[1:], count * seq_len)
    return np.repeat(indices.astype(np.int32), ends - document_starts).reshape(count, seq_len)


def best_fit(starts: Ints, ends: Ints, capacity: int) -> tuple[Ints, Ints, Ints]:
    """Packs the documents [start, end) of a token stream into rows of at most `capacity` tokens, best fit decreasing.

    Documents longer than a row are first cut into full rows, and only the remainder is packed. Returns (first, start,
    end): row r holds chunks first[r] to first[r + 1]. Deterministic; ties are broken by position.

    Cutting a stream into windows of 2,048 tokens cuts half of all documents, and truncating them discards a third of
    the tokens. Placing each document into the fullest row with enough room leaves 0.1% of the positions empty.
    """
    chunk_starts, chunk_ends = _cut_to_capacity(starts, ends, capacity)
    lengths = chunk_ends - chunk_starts
    rows: list[list[int]] = []
    open_rows: defaultdict[int, list[int]] = defaultdict(list)  # rows by their remaining room
    rooms = 0  # bit r is set when an open row has room r: the lowest set bit at or above a length is the best fit
    for chunk in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[chunk])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
            rows[row].append(chunk)
        else:
            room, row = capacity, len(rows)
            rows.append([chunk])
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    order = np.array([chunk for row in rows for chunk in sorted(row)], np.int64)
    first = np.cumsum([0, *map(len, rows)])
    return first, chunk_starts[order], chunk_ends[order]


def _cut_to_capacity(starts: Ints, ends: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Cuts each range into chunks of `capacity` and a shorter remainder; empty ranges disappear."""
    owner, index = expand_ranges(np.zeros_like(starts), -(-(ends - starts) // capacity))
    chunk_starts = starts[owner] + index * capacity
    return chunk_starts, np.minimum(chunk_starts + capacity, ends[owner])


def expand_ranges(first: Ints, end: Ints) -> tuple[Ints, Ints]:
    """Concatenates the ranges [first[i], end[i]). Returns (the i of each number, the numbers)."""
    counts = end - first
    owner = np.repeat(np.arange(len(first)), counts)
    return owner, np.arange(len(owner)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
