"""Conversations to training sequences of a fixed shape. n rows of L = seq_len places.

A conversation of t tokens takes t - 1 places: token i is input, token i + 1 its target where it is trained. So the
first token is no target, and none is a target twice. What is not trained, and padding, has the target IGNORE.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from anarchobot.data.conversations.table import Table
from anarchobot.data.packing import best_fit, ranges
from anarchobot.data.windows import IGNORE, Rows


class ConversationWindows:
    """Rows by number, as `data.batches` takes them.

    `pack`: whole conversations share rows (best fit), and `segments` keep them apart; else each has a row to itself and
    needs none, because nothing sees what comes later. Every conversation must fit: at most `seq_len` + 1 tokens.
    """

    def __init__(self, table: Table, seq_len: int, pack: bool, pad_id: int) -> None:
        begins, ends = table.bounds[:-1], table.bounds[1:] - 1
        assert not table.count or (ends - begins).max() <= seq_len
        if pack:
            self._first, self._begins, self._ends = best_fit(begins, ends, seq_len)
        else:
            self._first, self._begins, self._ends = np.arange(table.count + 1), begins, ends
        self.count = len(self._first) - 1
        self._table, self._seq_len, self._pack, self._pad_id = table, seq_len, pack, pad_id

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Rows by their numbers; one beyond the last is all padding."""
        numbers = np.minimum(numbers, self.count)
        rows, pieces = ranges(self._first[numbers], self._first[np.minimum(numbers + 1, self.count)])
        begins, ends = self._begins[pieces], self._ends[pieces]
        before = np.cumsum(ends - begins) - (ends - begins)  # places taken by the pieces before, in all rows
        firsts = np.searchsorted(rows, rows)  # the first piece of each piece's row
        starts = rows * self._seq_len + before - before[firsts]

        owner, source = ranges(begins, ends)
        places = starts[owner] + source - begins[owner]
        inputs = np.full((len(numbers), self._seq_len), self._pad_id, np.int32)
        targets = np.full_like(inputs, IGNORE)
        ids, trained = self._table.ids, self._table.trained
        inputs.reshape(-1)[places] = ids[source]
        targets.reshape(-1)[places] = np.where(trained[source + 1], ids[source + 1].astype(np.int32), IGNORE)
        if not self._pack:
            return Rows(inputs, targets, None)
        # Padding is a segment of its own, behind the last of its row.
        segments = np.repeat(np.bincount(rows, minlength=len(numbers))[:, None], self._seq_len, axis=1).astype(np.int32)
        segments.reshape(-1)[places] = (np.arange(len(pieces)) - firsts)[owner]
        return Rows(inputs, targets, segments)

    def digest(self) -> str:
        """What a run must find again to be resumed: the conversations and how they are laid out."""
        layout = f"{self._table.digest()} seq_len {self._seq_len} pack {self._pack}"
        return hashlib.sha256(layout.encode()).hexdigest()

    @property
    def fill(self) -> float:
        """Share of the places that hold conversations."""
        return float((self._ends - self._begins).sum()) / max(1, self.count * self._seq_len)
