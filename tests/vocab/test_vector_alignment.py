"""Mapping to a shared space and nearest neighbors, compared with closed forms and full matrices."""

import tracemalloc

import numpy as np
import pytest

from anarchobot.vocab import vector_alignment
from anarchobot.vocab.vector_alignment import (
    Floats,
    map_to_shared_space,
    nearest_neighbors,
    normalize_rows,
    procrustes_rotation,
)

RNG = np.random.default_rng(0)


def vectors(rows: int, dim: int = 24) -> Floats:
    return RNG.standard_normal((rows, dim)).astype(np.float32)


def random_rotation(dim: int = 24) -> Floats:
    return np.linalg.qr(RNG.standard_normal((dim, dim)))[0].astype(np.float32)


def test_a_known_rotation_is_recovered() -> None:
    x, w = vectors(100), random_rotation()
    assert np.allclose(procrustes_rotation(x, x @ w), w, atol=1e-4)
    found = procrustes_rotation(x, x @ w + 0.1 * vectors(100))
    assert np.allclose(found @ found.T, np.eye(24), atol=1e-5)  # orthogonal for any data
    assert np.abs(found - w).max() < 0.1


@pytest.mark.parametrize("cells", [1, 7 * 55, 2**22])
def test_csls_equals_that_of_the_full_matrix(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_alignment, "MAX_BLOCK_CELLS", cells)
    t, s = normalize_rows(vectors(40)), normalize_rows(vectors(60))
    rows, candidates = np.arange(3, 33), np.arange(5, 60)
    found = nearest_neighbors("procrustes", t, s, rows, candidates, 4)
    cosines = (t[rows].astype(np.float64)) @ s[candidates].astype(np.float64).T
    r_t = np.sort(cosines, axis=1)[:, -10:].mean(axis=1, keepdims=True)
    r_s = np.sort(cosines, axis=0)[-10:].mean(axis=0, keepdims=True)
    best = np.argsort(-(2 * cosines - r_t - r_s), axis=1)[:, :4]
    assert np.array_equal(found.ids, candidates[best])
    weights = np.exp(np.take_along_axis(cosines, best, axis=1) / 0.1)
    weights /= weights.sum(axis=1, keepdims=True)
    assert np.allclose(found.weights, weights, atol=1e-5)
    for row, mean in enumerate(w @ s[candidates[ids]] for w, ids in zip(weights, best, strict=True)):
        assert np.isclose(found.similarity[row], t[rows[row]] @ mean / np.linalg.norm(mean), atol=1e-5)


def test_the_similarity_of_a_single_neighbor_is_its_cosine() -> None:
    t, s = normalize_rows(vectors(10)), normalize_rows(vectors(20))
    found = nearest_neighbors("procrustes", t, s, np.arange(10), np.arange(20), 1)
    assert np.allclose(found.similarity, (t * s[found.ids[:, 0]]).sum(axis=1), atol=1e-6)
    assert found.weights.tolist() == [[1.0]] * 10


def test_memory_is_bounded_for_a_large_vocabulary() -> None:
    """The full matrix of 8,000 by 8,000 cosines would take 256 MB."""
    t, s = normalize_rows(vectors(8000)), normalize_rows(vectors(8000))
    tracemalloc.start()
    nearest_neighbors("procrustes", t, s, np.arange(2000), np.arange(8000), 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 130e6


def test_relative_is_tokalign() -> None:
    """The best dot product of cosines to the pivots."""
    t, s = vectors(30), vectors(50)
    pivots = np.array([1, 4, 9]), np.array([0, 7, 30])
    ours = map_to_shared_space("relative", t, s, pivots, (np.ones(30, bool), np.ones(50, bool)))
    cosine_t = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in t[pivots[0]]] for a in t])
    cosine_s = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in s[pivots[1]]] for a in s])
    found = nearest_neighbors("relative", *ours, np.arange(30), np.arange(50), 1)
    assert np.array_equal(found.ids[:, 0], np.argmax(cosine_t @ cosine_s.T, axis=1))


def test_no_rows_give_no_neighbors() -> None:
    found = nearest_neighbors(
        "procrustes", normalize_rows(vectors(5)), normalize_rows(vectors(5)), np.arange(0), np.arange(5), 3
    )
    assert found.ids.shape == (0, 3)
