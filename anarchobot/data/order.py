"""A permutation that can be asked for any place of it: shuffling without a list, the same on every machine."""

import hashlib

import numpy as np
import numpy.typing as npt

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
