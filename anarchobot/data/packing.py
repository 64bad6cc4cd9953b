"""Documents into rows of a fixed length, none cut that fits: best fit, longest first.

Cutting a stream into windows cuts half of all documents at 2,048 tokens; cropping what does not fit throws a third of
the tokens away. Placing each document into the fullest row that still has room leaves 0.1 % of the places empty.
"""

from collections import defaultdict

import numpy as np
import numpy.typing as npt

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
