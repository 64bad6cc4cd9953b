"""Windows to batches. Shapes: A micro-batches, B sequences per micro-batch, L = seq_len tokens.

The order is a function of the seed and the position, so the batch of any step can be read directly, and a resumed run
continues with exactly the next window.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from anarchobot.data.windows import Batch, ConcatWindows, Ints, Windows, gather

ORDER_BLOCK = 4096  # positions permuted at once; one at a time would cost more than reading
MIXTURE_PATTERN = 4096  # windows after which a mixture repeats; weights are accurate to 1 in 4,096
_ROUNDS = 6  # of the Feistel network


class TrainSource(Protocol):
    """Where a run gets its batches from. `windows` is the number of training sequences in an epoch; `at` returns the
    batch that starts at a position, which counts them over the whole run."""

    windows: int

    def __enter__(self) -> object: ...
    def __exit__(self, *exc: object) -> None: ...
    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> Batch: ...


class ValSource(Protocol):
    """Validation batches [1, B, ...] by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Batch: ...


class TrainBatches:
    """Batches from one or more sets of windows, reshuffled every epoch.

    Without weights, the sets are concatenated: every window is seen once per epoch. With weights, each set contributes
    its share of any stretch of the run and has separate epochs. `windows` is the total number of windows.
    """

    def __init__(self, sets: Sequence[Windows], seed: int, weights: Sequence[float] | None = None) -> None:
        self.windows = sum(s.count for s in sets)
        self._sets = sets if weights is not None or len(sets) == 1 else [ConcatWindows(sets)]
        self._pattern = _mixture_pattern(weights or [1.0])
        self._seed = seed
        self._block = lru_cache(maxsize=2 * len(sets))(self._order_block)

    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> Batch:
        """The batch that starts at window `position`, counted over the whole run, not the epoch."""
        owners, indices = self._draw(np.arange(position, position + micro_batches * micro_batch_size))
        return gather(self._sets, owners, indices).micro_batches(micro_batches, micro_batch_size)

    def drawn(self, first: int, end: int) -> Ints:
        """The windows at positions [first, end), each once: sorted indices into the concatenation of all sets."""
        starts = np.cumsum([0, *(s.count for s in self._sets)])
        seen = np.zeros(starts[-1], bool)
        for position in range(first, end, ORDER_BLOCK):
            owners, indices = self._draw(np.arange(position, min(end, position + ORDER_BLOCK)))
            seen[starts[owners] + indices] = True
            if seen.all():
                break
        return np.flatnonzero(seen)

    def _draw(self, positions: Ints) -> tuple[Ints, Ints]:
        """The set and the window of each of increasing positions."""
        if len(self._sets) == 1:
            return np.zeros_like(positions), self._shuffle(positions, 0)
        owners, positions = self._assign_sets(positions)
        indices = np.empty_like(positions)
        for s in np.unique(owners).tolist():
            indices[owners == s] = self._shuffle(positions[owners == s], s)
        return owners, indices

    def _assign_sets(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The set that each position draws from, and the position within that set's sequence."""
        pattern, before = self._pattern
        repeats, offsets = positions // len(pattern), positions % len(pattern)
        owners = pattern[offsets]
        return owners, repeats * before[owners, -1] + before[owners, offsets]

    def _shuffle(self, positions: npt.NDArray[np.int64], s: int) -> npt.NDArray[np.int64]:
        """The window indices at increasing `positions` of set s."""
        blocks = range(int(positions[0]) // ORDER_BLOCK, int(positions[-1]) // ORDER_BLOCK + 1)
        order = np.concatenate([self._block(block, s) for block in blocks])
        return order[positions - blocks[0] * ORDER_BLOCK]

    def _order_block(self, block: int, s: int) -> npt.NDArray[np.int64]:
        size = self._sets[s].count
        positions = np.arange(block * ORDER_BLOCK, (block + 1) * ORDER_BLOCK)
        windows, epochs = np.empty_like(positions), positions // size
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            mask = epochs == epoch
            windows[mask] = permute(positions[mask] % size, size, self._seed + s, epoch)
        return windows


class ValBatches:
    """The first validation windows, at most `limit`, in order. The last batch is padded with unscored rows."""

    def __init__(self, windows: Windows, micro_batch_size: int, limit: int | None) -> None:
        self._windows, self._rows = windows, micro_batch_size
        self._count = windows.count if limit is None else min(limit, windows.count)
        self._batches = -(-self._count // micro_batch_size)

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch `index`, as [1, B, L]."""
        if not 0 <= index < self._batches:
            raise IndexError(index)
        indices = np.arange(index * self._rows, (index + 1) * self._rows)
        indices[indices >= self._count] = self._windows.count  # beyond the last window: not scored
        rows = self._windows.rows(indices)
        return rows.micro_batches(1, self._rows)


class Prefetcher:
    """Reads the next batch in a thread while the current one trains (numpy only).

    If the next request is for a different position, the prefetched batch is dropped. In data-parallel training, every
    rank requests the same step and gets its slice of it.
    """

    def __init__(self, batches: TrainBatches, rank: int = 0, ranks: int = 1) -> None:
        self.windows = batches.windows
        self._batches, self._rank, self._ranks = batches, rank, ranks
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[tuple[int, int, int], Future[Batch]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> Batch:
        size = micro_batches * micro_batch_size
        request = (position + self._rank * size, micro_batches, micro_batch_size)
        batch = self._next[1].result() if self._next and self._next[0] == request else self._batches.at(*request)
        following = (request[0] + self._ranks * size, micro_batches, micro_batch_size)
        self._next = following, self._pool.submit(self._batches.at, *following)
        return batch


def _mixture_pattern(weights: Sequence[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the set of each of P = MIXTURE_PATTERN windows, [P], always the one furthest behind its share; and how
    many windows of each set precede each position, [sets, P + 1]."""
    shares = np.array(weights) / sum(weights)
    before = np.zeros((len(shares), MIXTURE_PATTERN + 1), np.int64)
    pattern = np.empty(MIXTURE_PATTERN, np.int64)
    for i in range(MIXTURE_PATTERN):
        pattern[i] = np.argmax(shares * (i + 1) - before[:, i])
        before[:, i + 1] = before[:, i]
        before[pattern[i], i + 1] += 1
    return pattern, before


def permute(positions: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Maps positions in [0, size) through a pseudorandom permutation; O(1) time and memory per position.

    A balanced Feistel network (Luby and Rackoff, 1988) permutes the next power of four. A result outside `size` is fed
    through again until it falls inside ("cycle walking", Black and Rogaway, 2002), which keeps it a permutation. The
    result is the same on every machine and must never change: resumed runs depend on it.
    """
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    keys = np.frombuffer(digest[: 4 * _ROUNDS], "<u4").astype(np.uint64)
    result = positions.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & np.uint64(mask)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & np.uint64(mask))
        result[outside] = left << np.uint64(half) | right
        outside = result >= size
    return result.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014): every bit of x affects every bit of the result."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
