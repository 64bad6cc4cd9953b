"""Preference pairs to batches. Shapes: A micro-batches, B pairs in each, L = seq_len places of an answer's sequence.

Of each pair come two sequences, chosen and rejected: the prompt and an answer, whose tokens, with the end of the turn,
are the targets.
"""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from anarchobot.data.batches import Batch, TrainBatches, ValBatches
from anarchobot.data.conversations.sequences import ConversationWindows
from anarchobot.data.conversations.table import Table
from anarchobot.data.windows import Rows


@dataclass(frozen=True)
class PairBatch(Batch):
    """int32 [A, B, 2, L] `inputs` and `targets` (negative: not scored), chosen before rejected; no segments. `numbers`,
    int64 [A, B]: which pairs these are; -1 is none, and has no targets. `reference`, float32 [A, B, 2]: the answers'
    log-probabilities under the model that the tuned one is compared with."""

    numbers: npt.NDArray[np.int64] = field(kw_only=True)
    reference: npt.NDArray[np.float32] = field(kw_only=True)


class Pairs:
    """Pairs by number, 0 to `count` - 1: of row n of each table, the same prompt with the one answer and the other.
    `reference`, float32 [count, 2], goes into their batches: zeros, until somebody knows better."""

    def __init__(self, chosen: Table, rejected: Table, seq_len: int, pad_id: int) -> None:
        assert chosen.count == rejected.count
        self.count, self.seq_len = chosen.count, seq_len
        self.reference: npt.NDArray[np.float32] = np.zeros((self.count, 2), np.float32)
        self._sides = [ConversationWindows(side, seq_len, pack=False, pad_id=pad_id) for side in (chosen, rejected)]

    def batch(self, numbers: npt.NDArray[np.int64]) -> PairBatch:
        """`numbers`: int64 [A, B]; one beyond the last pair is none."""
        chosen, rejected = (side.rows(numbers.reshape(-1)) for side in self._sides)  # [A B, L]
        shape = (*numbers.shape, 2, self.seq_len)
        inputs = np.stack([chosen.inputs, rejected.inputs], axis=1).reshape(shape)
        targets = np.stack([chosen.targets, rejected.targets], axis=1).reshape(shape)
        known = numbers < self.count
        reference = np.zeros((*numbers.shape, 2), np.float32)
        reference[known] = self.reference[numbers[known]]
        return PairBatch(inputs, targets, numbers=np.where(known, numbers, -1), reference=reference)

    def digest(self) -> str:
        """What a run, or a cache of log-probabilities, must find again."""
        return hashlib.sha256(" ".join(side.digest() for side in self._sides).encode()).hexdigest()


class _Numbers:
    """Windows that hold nothing but their number: what is left of batches is their order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        column = numbers[:, None].astype(np.int32)
        return Rows(column, column, None)


class PairTrainBatches(TrainBatches):
    """All pairs once an epoch, shuffled anew in each, in the order that the same number of windows would have."""

    def __init__(self, pairs: Pairs, seed: int) -> None:
        super().__init__([_Numbers(pairs.count)], seed)
        self._pairs = pairs

    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> PairBatch:
        """The batch whose first pair is number `position` of the run."""
        return self._pairs.batch(_numbers(super().at(position, micro_batches, micro_batch_size)))


class PairValBatches(ValBatches):
    """The held-out pairs in order; the last micro-batch is filled up with pairs that are none."""

    def __init__(self, pairs: Pairs, micro_batch_size: int, limit: int | None) -> None:
        super().__init__(_Numbers(pairs.count), micro_batch_size, limit)
        self._pairs = pairs

    def __getitem__(self, index: int) -> PairBatch:
        return self._pairs.batch(_numbers(super().__getitem__(index)))


def _numbers(batch: Batch) -> npt.NDArray[np.int64]:
    return batch.inputs[:, :, 0].astype(np.int64)
