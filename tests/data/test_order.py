"""The shuffle is a permutation, another one for each seed and epoch, and favours no place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.data.order import permuted


def whole(size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return permuted(np.arange(size), size, seed, epoch).tolist()


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**6))
def test_every_place_is_taken_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(whole(size, seed, epoch)) == list(range(size))


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1023, 1024, 1025, 4096, 4097, 16384, 65537])
def test_every_place_is_taken_once_around_powers_of_two(size: int) -> None:
    assert sorted(whole(size)) == list(range(size))


@given(st.lists(st.integers(0, 10**15 - 1), min_size=1, max_size=20), st.integers(0, 100))
def test_a_place_can_be_asked_for_alone_and_far_out(places: list[int], seed: int) -> None:
    size = 10**15
    together = permuted(np.array(places), size, seed, 3)
    alone = [int(permuted(np.array([place]), size, seed, 3)[0]) for place in places]
    assert together.tolist() == alone and together.dtype == np.int64
    assert min(alone) >= 0 and max(alone) < size
    assert len(set(alone)) == len(set(places))


def test_seeds_and_epochs_give_orders_of_their_own() -> None:
    orders = {tuple(whole(100, seed, epoch)) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 400
    assert tuple(range(100)) not in orders


def test_the_order_is_fixed_for_all_time() -> None:
    """A run that goes on with another version, or on another machine, must see the same windows."""
    assert whole(10, seed=0) == [3, 7, 8, 0, 6, 9, 4, 1, 5, 2]
    assert whole(10, seed=1, epoch=2) == [7, 1, 9, 4, 6, 2, 8, 5, 3, 0]


@pytest.mark.parametrize("size", [2, 3, 5, 16, 21])
def test_no_place_is_favoured(size: int) -> None:
    """Chi-square of where each place lands over many seeds, against an even spread: mean f, deviation sqrt(2 f)."""
    seeds = 2000
    landed = np.zeros((size, size))
    for seed in range(seeds):
        landed[np.arange(size), whole(size, seed)] += 1
    expected = seeds / size
    chi_square = ((landed - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [16, 21, 64])
def test_neighbours_do_not_stay_neighbours(size: int) -> None:
    """The step from one place's target to the next one's is spread evenly too."""
    seeds = 1000
    steps = np.concatenate([np.diff(whole(size, seed)) % size for seed in range(seeds)])
    counts = np.bincount(steps, minlength=size)[1:]
    expected = len(steps) / (size - 1)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square - (size - 2) < 6 * np.sqrt(2 * (size - 2))
