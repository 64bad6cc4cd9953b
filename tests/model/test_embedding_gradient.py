"""Sums of rows by token id against float64, and that a GPU's scatter adds at most one nonzero row to each id."""

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.model import embedding_gradient
from anarchobot.model.embedding_gradient import add_rows
from anarchobot.numerics.device import gpu_path


@pytest.mark.parametrize("count", [1, 7, 8, 30])
def test_rows_are_added_by_id(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of 8 tokens, over which ids repeat."""
    monkeypatch.setattr(embedding_gradient, "_CHUNK", 8)
    rng = np.random.default_rng(count)
    total, ids, rows = rng.standard_normal((5, 6)), rng.integers(0, 5, count), rng.standard_normal((count, 6))
    arrays = mx.array(total, mx.float32), mx.array(ids), mx.array(rows, mx.float32)
    np.add.at(total, ids, rows)
    np.testing.assert_allclose(np.array(add_rows(*arrays)), total, atol=1e-5)
    with gpu_path():
        np.testing.assert_allclose(np.array(add_rows(*arrays)), total, atol=1e-5)


def test_the_order_in_which_a_scatter_adds_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scatter that visits its rows in random order stands for a GPU's."""
    rng = np.random.default_rng(0)

    class Scatter:
        def __init__(self, array: mx.array) -> None:
            self.array = array

        def __getitem__(self, ids: mx.array) -> "Scatter":
            self.ids = ids
            return self

        def add(self, rows: mx.array) -> mx.array:
            total, order = np.array(self.array), rng.permutation(self.ids.size)
            np.add.at(total, np.array(self.ids)[order], np.array(rows)[order])
            return mx.array(total)

    ids = mx.array(rng.integers(0, 40, 1500))
    rows, total = (mx.array(rng.standard_normal((n, 16)), mx.float32) for n in (1500, 40))
    monkeypatch.setattr(mx.array, "at", property(Scatter))
    assert not mx.array_equal(add_rows(total, ids, rows), add_rows(total, ids, rows))
    with gpu_path():
        assert mx.array_equal(add_rows(total, ids, rows), add_rows(total, ids, rows))
