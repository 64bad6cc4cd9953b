"""Batch order: every window once per epoch, random access, and mixture weights; the permutation behind it."""

from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.data.batches import MIXTURE_PATTERN, Prefetcher, TrainBatches, ValBatches, permute
from anarchobot.data.windows import Batch


class Indexed:
    """Windows whose inputs are (set, index)."""

    def __init__(self, count: int, name: int = 0, segments: bool = False) -> None:
        self.count, self._name, self._segments = count, name, segments

    def rows(self, numbers: npt.NDArray[np.int64]) -> Batch:
        ids = np.stack([np.full_like(numbers, self._name), numbers], axis=1).astype(np.int32)
        return Batch(ids, ids + 1, ids if self._segments else None)


def taken(batch: Batch) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in batch.inputs.reshape(-1, 2)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=3), st.integers(0, 5), st.integers(0, 3))
def test_epoch_has_every_window_once(counts: list[int], seed: int, epoch: int) -> None:
    batches = TrainBatches([Indexed(n, i) for i, n in enumerate(counts)], seed)
    total = sum(counts)
    assert batches.windows == total
    got = taken(batches.at(epoch * total, 1, total))
    assert sorted(got) == [(i, number) for i, n in enumerate(counts) for number in range(n)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20000), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_random_access_matches_sequential_order(start: int, a: int, b: int, weighted: bool) -> None:
    """Also across epochs and order blocks, for any batch shape."""
    sets, weights = [Indexed(700, 0), Indexed(90, 1)], [0.9, 0.1] if weighted else None
    ones = TrainBatches(sets, 3, weights)
    one_by_one = [w for p in range(start, start + a * b) for w in taken(ones.at(p, 1, 1))]
    batch = TrainBatches(sets, 3, weights).at(start, a, b)
    assert batch.inputs.shape == (a, b, 2) and batch.inputs.dtype == np.int32
    assert taken(batch) == one_by_one
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)


def test_each_seed_and_epoch_reshuffles() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return taken(TrainBatches([Indexed(50)], seed).at(epoch * 50, 1, 50))

    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9
    assert order(1, 1) == order(1, 1)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [5.0, 3.0, 2.0], [1.0, 1e-4], [1.0]])
def test_mixture_follows_its_weights_at_all_times(weights: list[float]) -> None:
    batches = TrainBatches([Indexed(300, i) for i in range(len(weights))], 0, weights)
    shares = np.array(weights) / sum(weights)
    owners = batches.at(0, 1, 4 * MIXTURE_PATTERN).inputs[..., 0].ravel()
    for s, share in enumerate(shares.tolist()):
        so_far = np.cumsum(owners == s)
        assert np.abs(so_far - share * np.arange(1, len(owners) + 1)).max() < 1 + len(weights) + 4


def test_each_set_of_a_mixture_has_its_own_epochs() -> None:
    batches = TrainBatches([Indexed(40, 0), Indexed(1000, 1)], 0, [1.0, 1.0])
    windows = taken(batches.at(0, 1, 160))
    small = [number for name, number in windows if name == 0]
    assert sorted(small[:40]) == sorted(small[40:]) == list(range(40))
    assert small[:40] != small[40:]
    assert len({number for name, number in windows if name == 1}) == 80


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_sets_of_equal_size_have_different_orders(seed: int) -> None:
    """Four sets in turn: two of them have the same number in the same place no more often than by chance, which is
    once per epoch on average."""
    size, epochs = 512, 2
    batches = TrainBatches([Indexed(size, i) for i in range(4)], seed, [1.0] * 4)
    windows = batches.at(0, 1, 4 * size * epochs).inputs.reshape(-1, 2)
    orders = [windows[windows[:, 0] == s, 1].reshape(epochs, size) for s in range(4)]
    for a, b in combinations(orders, 2):
        assert (a == b).sum(axis=1).max() < 10


def test_segments_are_batched() -> None:
    batches = TrainBatches([Indexed(9, 0, segments=True), Indexed(9, 1, segments=True)], 0)
    batch = batches.at(0, 3, 2)
    assert batch.segments is not None
    np.testing.assert_array_equal(batch.segments, batch.inputs)
    assert TrainBatches([Indexed(9)], 0).at(0, 1, 1).segments is None


def test_prefetcher_returns_the_same_batches_in_any_order() -> None:
    """After a jump (a resume, another shape), the prefetched batch must not be returned for a different request."""
    plain = TrainBatches([Indexed(100)], 0)
    with Prefetcher(TrainBatches([Indexed(100)], 0)) as fetched:
        assert fetched.windows == 100
        for request in ((0, 1, 4), (4, 1, 4), (8, 1, 4), (50, 1, 4), (54, 2, 2), (58, 2, 2), (4, 1, 4)):
            np.testing.assert_array_equal(fetched.at(*request).inputs, plain.at(*request).inputs)


def test_validation_is_in_order_up_to_its_limit() -> None:
    assert [taken(b) for b in ValBatches(Indexed(6), 3, None)] == [[(0, i) for i in r] for r in ([0, 1, 2], [3, 4, 5])]
    assert len(ValBatches(Indexed(7), 3, None)) == 3  # the last batch exceeds the windows: see StreamWindows
    for size in (1, 2, 3, 5, 8):  # the limit counts windows, whatever the size of a batch
        val = ValBatches(Indexed(7), size, 4)
        assert [i for n in range(len(val)) for _, i in taken(val[n]) if i < 7] == [0, 1, 2, 3]
    assert len(ValBatches(Indexed(0), 3, None)) == 0
    with pytest.raises(IndexError):
        ValBatches(Indexed(6), 3, None)[2]


def permutation(size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return permute(np.arange(size), size, seed, epoch).tolist()


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4096, 4097, 16384, 65537])
def test_permutation_is_a_bijection_near_powers_of_two(size: int) -> None:
    assert sorted(permutation(size)) == list(range(size))


@given(st.lists(st.integers(0, 10**15 - 1), min_size=1, max_size=20), st.integers(0, 100))
def test_permutation_has_random_access(places: list[int], seed: int) -> None:
    size = 10**15
    together = permute(np.array(places), size, seed, 3)
    alone = [int(permute(np.array([place]), size, seed, 3)[0]) for place in places]
    assert together.tolist() == alone and together.dtype == np.int64
    assert min(alone) >= 0 and max(alone) < size
    assert len(set(alone)) == len(set(places))


def test_seeds_and_epochs_give_different_permutations() -> None:
    orders = {tuple(permutation(100, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    assert tuple(range(100)) not in orders


def test_permutation_is_stable() -> None:
    """A run resumed with another version or on another machine must see the same windows."""
    assert permutation(10, seed=0) == [3, 7, 8, 0, 6, 9, 4, 1, 5, 2]
    assert permutation(10, seed=1, epoch=2) == [7, 1, 9, 4, 6, 2, 8, 5, 3, 0]


@pytest.mark.parametrize("size", [2, 3, 5, 16, 21])
def test_permutation_is_uniform(size: int) -> None:
    """Chi-square test of each position's target over many seeds: mean f, standard deviation sqrt(2 f)."""
    seeds = 2000
    landed = np.zeros((size, size))
    for seed in range(seeds):
        landed[np.arange(size), permutation(size, seed)] += 1
    expected = seeds / size
    chi_square = ((landed - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [16, 21, 64])
def test_neighbors_are_separated_uniformly(size: int) -> None:
    """The difference between the targets of adjacent positions is uniform."""
    seeds = 1000
    steps = np.concatenate([np.diff(permutation(size, seed)) % size for seed in range(seeds)])
    counts = np.bincount(steps, minlength=size)[1:]
    expected = len(steps) / (size - 1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square - (size - 2) < 6 * np.sqrt(2 * (size - 2))
