"""The order of a run: every window once an epoch, any batch without the ones before, mixtures by their weights."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.data.batches import MIXTURE_PATTERN, Batch, Prefetched, TrainBatches, ValBatches
from anarchobot.data.windows import Rows


class Numbered:
    """Windows whose inputs are (set, number)."""

    def __init__(self, count: int, name: int = 0, segments: bool = False) -> None:
        self.count, self._name, self._segments = count, name, segments

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        ids = np.stack([np.full_like(numbers, self._name), numbers], axis=1).astype(np.int32)
        return Rows(ids, ids + 1, ids if self._segments else None)


def taken(batch: Batch) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in batch.inputs.reshape(-1, 2)]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=3), st.integers(0, 5), st.integers(0, 3))
def test_an_epoch_has_every_window_of_every_set_once(counts: list[int], seed: int, epoch: int) -> None:
    batches = TrainBatches([Numbered(n, i) for i, n in enumerate(counts)], seed)
    total = sum(counts)
    assert batches.windows == total
    got = taken(batches.at(epoch * total, 1, total))
    assert sorted(got) == [(i, number) for i, n in enumerate(counts) for number in range(n)]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20000), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_any_batch_is_the_one_that_stepping_reaches(start: int, a: int, b: int, weighted: bool) -> None:
    """Also over the ends of epochs and of the blocks that the order is worked out in; in any shape of batch."""
    sets, weights = [Numbered(700, 0), Numbered(90, 1)], [0.9, 0.1] if weighted else None
    one_by_one = [w for p in range(start, start + a * b) for w in taken(TrainBatches(sets, 3, weights).at(p, 1, 1))]
    batch = TrainBatches(sets, 3, weights).at(start, a, b)
    assert batch.inputs.shape == (a, b, 2) and batch.inputs.dtype == np.int32
    assert taken(batch) == one_by_one
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)


def test_epochs_and_seeds_reshuffle() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return taken(TrainBatches([Numbered(50)], seed).at(epoch * 50, 1, 50))

    assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9
    assert order(1, 1) == order(1, 1)


@pytest.mark.parametrize("weights", [[0.7, 0.3], [5.0, 3.0, 2.0], [1.0, 1e-4], [1.0]])
def test_a_mixture_keeps_its_weights_in_any_stretch(weights: list[float]) -> None:
    batches = TrainBatches([Numbered(300, i) for i in range(len(weights))], 0, weights)
    shares = np.array(weights) / sum(weights)
    owners = batches.at(0, 1, 4 * MIXTURE_PATTERN).inputs[..., 0].ravel()
    for s, share in enumerate(shares.tolist()):
        so_far = np.cumsum(owners == s)
        assert np.abs(so_far - share * np.arange(1, len(owners) + 1)).max() < 1 + len(weights) + 4


def test_each_set_of_a_mixture_has_its_own_epochs() -> None:
    batches = TrainBatches([Numbered(40, 0), Numbered(1000, 1)], 0, [1.0, 1.0])
    windows = taken(batches.at(0, 1, 160))
    small = [number for name, number in windows if name == 0]
    assert sorted(small[:40]) == sorted(small[40:]) == list(range(40))
    assert small[:40] != small[40:]
    assert len({number for name, number in windows if name == 1}) == 80


def test_segments_come_along() -> None:
    batches = TrainBatches([Numbered(9, 0, segments=True), Numbered(9, 1, segments=True)], 0)
    batch = batches.at(0, 3, 2)
    assert batch.segments is not None
    np.testing.assert_array_equal(batch.segments, batch.inputs)
    assert TrainBatches([Numbered(9)], 0).at(0, 1, 1).segments is None


def test_prefetching_gives_the_same_batches_in_any_order() -> None:
    """After a jump (a resume, another shape) what was fetched ahead must not be taken for what was asked."""
    plain = TrainBatches([Numbered(100)], 0)
    with Prefetched(TrainBatches([Numbered(100)], 0)) as fetched:
        assert fetched.windows == 100
        for request in ((0, 1, 4), (4, 1, 4), (8, 1, 4), (50, 1, 4), (54, 2, 2), (58, 2, 2), (4, 1, 4)):
            np.testing.assert_array_equal(fetched.at(*request).inputs, plain.at(*request).inputs)


def test_validation_goes_through_from_the_start_up_to_its_limit() -> None:
    assert [taken(b) for b in ValBatches(Numbered(6), 3, None)] == [[(0, i) for i in r] for r in ([0, 1, 2], [3, 4, 5])]
    assert len(ValBatches(Numbered(7), 3, None)) == 3  # the last one asks for windows beyond: see StreamWindows
    assert len(ValBatches(Numbered(7), 3, 2)) == 2
    assert len(ValBatches(Numbered(0), 3, None)) == 0
    with pytest.raises(IndexError):
        ValBatches(Numbered(6), 3, None)[2]
