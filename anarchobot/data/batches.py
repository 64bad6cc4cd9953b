"""Shards to batches. Shapes: A micro-batches, B sequences in each, L = seq_len tokens.

The order is a function of the seed and of how many windows came before, so any step's batch can be had without the ones
before it, and a run that was stopped goes on with the very next window.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.data.order import permuted
from anarchobot.data.shards import TokenStream

IGNORE = -100  # a target that isn't scored, as in PyTorch and Hugging Face


@dataclass(frozen=True)
class Batch:
    """int32 `inputs` and the `targets` one place on, both [A, B, L]; targets of IGNORE are not scored."""

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]


class TrainBatches:
    """Windows of L+1 tokens that overlap by one, over all train shards as one sequence, reshuffled every epoch."""

    def __init__(self, stream: TokenStream, seq_len: int, seed: int) -> None:
        self.windows = (stream.tokens - 1) // seq_len
        if self.windows < 1:
            raise UserError(
                f"{stream.folder}: {stream.tokens} training tokens are less than one sequence of data.seq_len "
                f"{seq_len}: give more text, or a smaller seq_len"
            )
        self._stream, self._seq_len, self._seed = stream, seq_len, seed

    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> Batch:
        """The batch whose first window is number `position` of the run (not of the epoch)."""
        places = np.arange(position, position + micro_batches * micro_batch_size)
        windows = np.empty_like(places)
        epochs = places // self.windows
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            windows[chosen] = permuted(places[chosen] % self.windows, self.windows, self._seed, epoch)
        rows = np.stack([self._stream.read(w * self._seq_len, (w + 1) * self._seq_len + 1) for w in windows.tolist()])
        rows = rows.reshape(micro_batches, micro_batch_size, self._seq_len + 1)
        return Batch(np.ascontiguousarray(rows[..., :-1]), np.ascontiguousarray(rows[..., 1:]))


class ValBatches:
    """The validation split from its start, in order; its last, short window is filled up with IGNORE."""

    def __init__(self, stream: TokenStream, seq_len: int, micro_batch_size: int, limit: int | None) -> None:
        self._stream, self._seq_len, self._rows = stream, seq_len, micro_batch_size
        windows = -(-max(0, stream.tokens - 1) // seq_len)
        batches = -(-windows // micro_batch_size)
        self._batches = batches if limit is None else min(limit, batches)

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch `index`, as [1, B, L]."""
        if not 0 <= index < self._batches:
            raise IndexError(index)
        inputs = np.zeros((1, self._rows, self._seq_len), np.int32)
        targets = np.full_like(inputs, IGNORE)
        for row in range(self._rows):
            start = (index * self._rows + row) * self._seq_len
            length = min(self._seq_len, self._stream.tokens - 1 - start)
            if length > 0:  # else the split has ended
                ids = self._stream.read(start, start + length + 1)
                inputs[0, row, :length] = ids[:-1]
                targets[0, row, :length] = ids[1:]
        return Batch(inputs, targets)
