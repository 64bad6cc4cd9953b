"""Windows to batches. Shapes: A micro-batches, B sequences in each, L = seq_len tokens.

The order is a function of the seed and of how many windows came before, so any step's batch can be had without the ones
before it, and a run that was stopped goes on with the very next window.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Self

import numpy as np
import numpy.typing as npt

from anarchobot.data.windows import ConcatWindows, Rows, Windows, gather

ORDER_BLOCK = 4096  # places of the order that are worked out at a time: one at a time would cost more than the reading
MIXTURE_PATTERN = 4096  # windows after which a mixture's pattern repeats: weights are kept to 1 in 4,096


@dataclass(frozen=True)
class Batch:
    """int32 [A, B, L]: `inputs`, the `targets` one place on (negative: not scored), and with a document mask the
    `segments`: tokens see each other only within one number."""

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32] | None = None

    def rows(self, start: int, stop: int) -> Self:
        """These sequences of every micro-batch."""
        arrays = ((field.name, getattr(self, field.name)) for field in fields(self))
        return replace(self, **{name: x[:, start:stop] for name, x in arrays if x is not None})


class TrainBatches:
    """Several sets of windows in the order of a run: shuffled anew every epoch, mixed by weights when these are given.

    Without weights the sets are one: every window comes once an epoch. With them, set s gives its share of any stretch
    of the run, and has epochs of its own. `windows` is the number of windows in all sets.
    """

    def __init__(self, sets: Sequence[Windows], seed: int, weights: Sequence[float] | None = None) -> None:
        self.windows = sum(s.count for s in sets)
        self._sets = sets if weights is not None or len(sets) == 1 else [ConcatWindows(sets)]
        self._pattern = _pattern(weights or [1.0])
        self._seed = seed
        self._block = lru_cache(maxsize=2 * len(sets))(self._order_block)

    def at(self, position: int, micro_batches: int, micro_batch_size: int) -> Batch:
        """The batch whose first window is number `position` of the run (not of the epoch)."""
        places = np.arange(position, position + micro_batches * micro_batch_size)
        if len(self._sets) == 1:
            return _batch(self._sets[0].rows(self._shuffled(places, 0)), micro_batches, micro_batch_size)
        owners, places = self._mixed(places)
        numbers = np.empty_like(places)
        for s in np.unique(owners).tolist():
            numbers[owners == s] = self._shuffled(places[owners == s], s)
        return _batch(gather(self._sets, owners, numbers), micro_batches, micro_batch_size)

    def _mixed(self, places: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """For places of the run: the set each window comes from, and its place in that set's own run."""
        owned, before = self._pattern
        rounds, within = places // len(owned), places % len(owned)
        owners = owned[within]
        return owners, rounds * before[owners, -1] + before[owners, within]

    def _shuffled(self, places: npt.NDArray[np.int64], s: int) -> npt.NDArray[np.int64]:
        """The windows at increasing `places` of the run of set s."""
        blocks = range(int(places[0]) // ORDER_BLOCK, int(places[-1]) // ORDER_BLOCK + 1)
        order = np.concatenate([self._block(block, s) for block in blocks])
        return order[places - blocks[0] * ORDER_BLOCK]

    def _order_block(self, block: int, s: int) -> npt.NDArray[np.int64]:
        size = self._sets[s].count
        places = np.arange(block * ORDER_BLOCK, (block + 1) * ORDER_BLOCK)
        windows, epochs = np.empty_like(places), places // size
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            chosen = epochs == epoch
            windows[chosen] = permuted(places[chosen] % size, size, self._seed + s, epoch)
        return windows


class ValBatches:
    """The validation split from its start, in order; its last, short windows are filled up with unscored places."""

    def __init__(self, windows: Windows, micro_batch_size: int, limit: int | None) -> None:
        self._windows, self._rows = windows, micro_batch_size
        batches = -(-windows.count // micro_batch_size)
        self._batches = batches if limit is None else min(limit, batches)

    def __len__(self) -> int:
        return self._batches

    def __getitem__(self, index: int) -> Batch:
        """Micro-batch `index`, as [1, B, L]."""
        if not 0 <= index < self._batches:
            raise IndexError(index)
        return _batch(self._windows.rows(np.arange(index * self._rows, (index + 1) * self._rows)), 1, self._rows)


class Prefetcher:
    """Reads the batch after the one asked for in a thread (numpy only), while that one trains. The order is a function
    of the position, so a batch fetched for nothing costs nothing but its time.

    Of several ranks that train together, each asks for the same steps and gets its own part of them, in their order.
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
        own = micro_batches * micro_batch_size
        wanted = (position + self._rank * own, micro_batches, micro_batch_size)
        batch = self._next[1].result() if self._next and self._next[0] == wanted else self._batches.at(*wanted)
        following = (wanted[0] + self._ranks * own, micro_batches, micro_batch_size)
        self._next = following, self._pool.submit(self._batches.at, *following)
        return batch


def _batch(rows: Rows, micro_batches: int, micro_batch_size: int) -> Batch:
    def shaped(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        return np.ascontiguousarray(ids).reshape(micro_batches, micro_batch_size, -1)

    segments = None if rows.segments is None else shaped(rows.segments)
    return Batch(shaped(rows.inputs), shaped(rows.targets), segments)


def _pattern(weights: Sequence[float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which set each of MIXTURE_PATTERN windows comes from, always the one that lags furthest behind its share; and how
    many of each set come before each place: [P] and [sets, P + 1]."""
    shares = np.array(weights) / sum(weights)
    before = np.zeros((len(shares), MIXTURE_PATTERN + 1), np.int64)
    owned = np.empty(MIXTURE_PATTERN, np.int64)
    for i in range(MIXTURE_PATTERN):
        owned[i] = np.argmax(shares * (i + 1) - before[:, i])
        before[:, i + 1] = before[:, i]
        before[owned[i], i + 1] += 1
    return owned, before


_ROUNDS = 6


def permuted(places: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where the places 0 .. size-1 of `epoch` land in a shuffle of `size` things; O(1) memory, O(1) a place.

    A balanced Feistel network (Luby and Rackoff, 1988) shuffles the next power of four; a result beyond `size` is fed
    through again until it falls inside ("cycle walking", Black and Rogaway, 2002), which keeps it a permutation.
    """
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    keys = np.frombuffer(digest[: 4 * _ROUNDS], "<u4").astype(np.uint64)
    result = places.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & np.uint64(mask)
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & np.uint64(mask))
        result[outside] = left << np.uint64(half) | right
        outside = result >= size
    return result.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014): every bit of x reaches every bit of the result."""
    x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
