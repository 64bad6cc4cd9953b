"""Training sequences cut from a token stream, by number. Shapes: n rows, L = seq_len tokens.

Two ways: the stream itself in windows, or documents packed into rows (data.pack). Each token is a target exactly once
in an epoch, from the one before it: a document's first from an end of document, as in generation. (Of the stream, the
very first has none before it.) Places that are no target hold IGNORE.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.shards import TokenStream

IGNORE = -100  # a target that isn't scored, as in PyTorch and Hugging Face


@dataclass(frozen=True)
class Rows:
    """int32 [n, L]: `inputs`, the `targets` one place on, and, with a document mask, which document of the row each
    input belongs to (0, 1, ...)."""

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32] | None


class Windows(Protocol):
    """`count` training sequences, to be had by number in any order."""

    count: int

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows: ...


class ConcatWindows:
    """Several sets of windows as one, in their order."""

    def __init__(self, sets: Sequence[Windows]) -> None:
        self.count = sum(s.count for s in sets)
        self._sets, self._firsts = sets, np.cumsum([0, *(s.count for s in sets)])

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        owners = np.searchsorted(self._firsts[:-1], numbers, side="right") - 1
        return gather(self._sets, owners, numbers - self._firsts[owners])


def gather(sets: Sequence[Windows], owners: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64]) -> Rows:
    """Row i is window numbers[i] of set owners[i]."""
    if (owners == owners[0]).all():
        return sets[int(owners[0])].rows(numbers)
    parts = [(owners == s, sets[s].rows(numbers[owners == s])) for s in np.unique(owners).tolist()]
    inputs, targets = (np.empty((len(owners), parts[0][1].inputs.shape[1]), np.int32) for _ in range(2))
    segments = None if parts[0][1].segments is None else np.empty_like(inputs)
    for chosen, rows in parts:
        inputs[chosen], targets[chosen] = rows.inputs, rows.targets
        if segments is not None and rows.segments is not None:
            segments[chosen] = rows.segments
    return Rows(inputs, targets, segments)


def open_windows(
    stream: TokenStream, seq_len: int, pack: Literal["stream", "documents"], document_mask: bool
) -> Windows:
    """Raises UserError when the stream is shorter than one sequence."""
    if stream.tokens <= seq_len:
        raise UserError(
            f"{stream.folder}: {stream.tokens} training tokens are less than one sequence of data.seq_len {seq_len}: "
            "give more text, or a smaller seq_len"
        )
    return (StreamWindows if pack == "stream" else PackedWindows)(stream, seq_len, document_mask)


class StreamWindows:
    """Window w is tokens [w L, w L + L + 1): neighbours overlap by the one token that is target here, input there."""

    def __init__(self, stream: TokenStream, seq_len: int, document_mask: bool = False) -> None:
        self.count = -(-max(0, stream.tokens - 1) // seq_len)  # the last one may be short
        self._stream, self._seq_len = stream, seq_len
        self._documents = stream.document_starts() if document_mask else None

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        starts = numbers * self._seq_len
        missing = np.maximum(0, starts + self._seq_len + 1 - self._stream.tokens)
        if missing.any():
            return self._with_short_ones(starts, missing)
        ids = self._stream.rows(starts, self._seq_len + 1)
        return Rows(ids[:, :-1], ids[:, 1:], self._segments(starts))

    def _with_short_ones(self, starts: npt.NDArray[np.int64], missing: npt.NDArray[np.int64]) -> Rows:
        inputs = np.zeros((len(starts), self._seq_len), np.int32)
        targets = np.full_like(inputs, IGNORE)
        for row, (start, lacking) in enumerate(zip(starts.tolist(), missing.tolist(), strict=True)):
            scored = max(0, self._seq_len - lacking)  # a number beyond the last window is an empty row
            if scored:
                ids = self._stream.read(start, start + scored + 1)
                inputs[row, :scored], targets[row, :scored] = ids[:-1], ids[1:]
        return Rows(inputs, targets, self._segments(starts))

    def _segments(self, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32] | None:
        if self._documents is None:
            return None
        inner, behind = np.searchsorted(self._documents, np.stack([starts + 1, starts + self._seq_len]))
        rows, documents = ranges(inner, behind)  # those that begin inside a window
        firsts = np.arange(len(starts)) * self._seq_len
        inside = firsts[rows] + self._documents[documents] - starts[rows]
        return _segments(np.sort(np.concatenate([firsts, inside])), len(starts), self._seq_len)


class PackedWindows:
    """Rows of whole documents (best fit); only one longer than a row is cut. What is left of a row is filled with ends
    of document that are no target."""

    def __init__(self, stream: TokenStream, seq_len: int, document_mask: bool = False) -> None:
        bounds = stream.document_starts()
        self._first, self._starts, self._ends = best_fit(bounds[:-1], bounds[1:], seq_len)
        self.count = len(self._first) - 1
        self._stream, self._seq_len, self._mask = stream, seq_len, document_mask
        self._filling = np.full(seq_len, stream.manifest.eod_id, stream.manifest.dtype).data

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        rows, pieces = ranges(self._first[numbers], self._first[numbers + 1])
        starts, ends = self._starts[pieces], self._ends[pieces]
        targets, inputs = self._stream.stretches(starts, ends), self._stream.stretches(starts - 1, ends - 1)
        lengths = ends - starts
        used = np.bincount(rows, lengths, len(numbers)).astype(np.int64)
        short = np.flatnonzero(used < self._seq_len)
        if len(short):
            behind = np.searchsorted(rows, short, side="right")
            lengths = np.insert(lengths, behind, self._seq_len - used[short])  # the filling is a document of its own
            for place, row in zip(reversed(behind.tolist()), reversed(short.tolist()), strict=True):
                filling = self._filling[used[row] :]
                targets.insert(place, filling)
                inputs.insert(place, filling)
        shape = len(numbers), self._seq_len
        scored = self._stream.joined(targets).reshape(shape)
        for row in short.tolist():
            scored[row, used[row] :] = IGNORE
        segments = _segments(np.cumsum(lengths) - lengths, *shape) if self._mask else None
        return Rows(self._stream.joined(inputs).reshape(shape), scored, segments)


def _segments(places: npt.NDArray[np.int64], count: int, seq_len: int) -> npt.NDArray[np.int32]:
    """int32 [count, seq_len]: which document of its row each place belongs to, given in order where documents begin in
    the flat rows, one at the start of each among them."""
    rows = places // seq_len
    numbers = np.arange(len(places)) - np.searchsorted(rows, rows)
    ends = np.append(places[1:], count * seq_len)
    return np.repeat(numbers.astype(np.int32), ends - places).reshape(count, seq_len)


Ints = npt.NDArray[np.int64]


def best_fit(starts: Ints, ends: Ints, capacity: int) -> tuple[Ints, Ints, Ints]:
    """Packs the stretches [start, end) of a token stream into rows of at most `capacity` tokens.

    Longer ones are cut into full rows first, and only their rest is packed. Returns (first, start, end): row r holds
    the pieces first[r] to first[r + 1]. The same documents give the same rows: no randomness, ties by position.
    """
    piece_starts, piece_ends = _cut(starts, ends, capacity)
    lengths = piece_ends - piece_starts
    rows: list[list[int]] = []
    open_rows: defaultdict[int, list[int]] = defaultdict(list)  # rows by the room they have left
    rooms = 0  # bit r is set when some open row has room r: its lowest bit at or above a length is the best fit
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
            rows[row].append(piece)
        else:
            room, row = capacity, len(rows)
            rows.append([piece])
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    order = np.array([piece for row in rows for piece in sorted(row)], np.int64)
    first = np.cumsum([0, *map(len, rows)])
    return first, piece_starts[order], piece_ends[order]


def _cut(starts: Ints, ends: Ints, capacity: int) -> tuple[Ints, Ints]:
    """Each stretch in pieces of `capacity`, its last one shorter; empty stretches vanish."""
    owner, number = ranges(np.zeros_like(starts), -(-(ends - starts) // capacity))
    piece_starts = starts[owner] + number * capacity
    return piece_starts, np.minimum(piece_starts + capacity, ends[owner])


def ranges(first: Ints, end: Ints) -> tuple[Ints, Ints]:
    """All numbers of the ranges first[i] to end[i], one range behind the other, and before them the i of each."""
    counts = end - first
    owner = np.repeat(np.arange(len(first)), counts)
    return owner, np.arange(len(owner)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
