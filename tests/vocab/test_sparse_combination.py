"""FOCUS's and tokensurgeon's combinations, compared with independent implementations."""

import numpy as np
import pytest

from anarchobot.vocab import vector_alignment
from anarchobot.vocab.sparse_combination import matching_pursuit, sparsemax, sparsemax_combination
from anarchobot.vocab.vector_alignment import Floats

RNG = np.random.default_rng(0)


def vectors(rows: int, dim: int = 24) -> Floats:
    return RNG.standard_normal((rows, dim)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)


def dense(combinations: list[tuple[np.ndarray, np.ndarray]], size: int) -> np.ndarray:
    full = np.zeros((len(combinations), size))
    for row, (ids, weights) in zip(full, combinations, strict=True):
        row[ids] = weights
    return full


def test_sparsemax_by_hand() -> None:
    found = sparsemax(np.array([[0.1, 1.1, 0.2], [0.0, 0.0, 0.0], [5.0, 0.0, 4.5], [-3.0, -9.0, -3.5]]))
    assert np.allclose(found, [[0, 0.95, 0.05], [1 / 3] * 3, [0.75, 0, 0.25], [0.75, 0, 0.25]])


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    """The threshold is found by bisection instead of sorting: sum(max(z - threshold, 0)) = 1."""
    scores = RNG.standard_normal((50, 30)) * RNG.choice([0.05, 0.5, 3.0], (50, 1))
    low, high = scores.min(axis=1) - 1, scores.max(axis=1)
    for _ in range(60):
        middle = (low + high) / 2
        above = np.maximum(scores - middle[:, None], 0).sum(axis=1) > 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    assert np.allclose(sparsemax(scores), np.maximum(scores - low[:, None], 0), atol=1e-9)


@pytest.mark.parametrize("cells", [1, 2**22])
def test_focus_weights_are_the_sparsemax_of_the_cosines(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_alignment, "MAX_BLOCK_CELLS", cells)
    new, shared = 3 * vectors(20), 0.5 * vectors(60)
    found = list(sparsemax_combination(new, shared))
    assert np.allclose(dense(found, 60), sparsemax(unit(new) @ unit(shared).T), atol=1e-5)
    assert all((weights > 0).all() and len(ids) == len(weights) < 60 for ids, weights in found)
    assert np.allclose([weights.sum() for _, weights in found], 1, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 12])
def test_matching_pursuit_is_that_of_least_squares(k: int) -> None:
    """Each step adds the row with the largest correlation to the residual, and solves for all weights again."""
    new, shared = vectors(15), vectors(60)
    targets, atoms = unit(new), unit(shared)
    expected = np.zeros((15, 60))
    for row, target in zip(expected, targets, strict=True):
        chosen: list[int] = []
        residual = target
        for _ in range(k):
            chosen.append(int(np.argmax(np.abs(atoms @ residual))))
            weights = np.linalg.lstsq(atoms[chosen].T, target, rcond=None)[0]
            residual = target - weights @ atoms[chosen]
        row[chosen] = weights
    found = dense(list(matching_pursuit(new, shared, k)), 60)
    assert np.allclose(found, expected, atol=1e-5)
    assert (np.count_nonzero(found, axis=1) == k).all()
    assert found.min() < 0 or k == 1


def test_matching_pursuit_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    new, shared = vectors(10), vectors(50)
    theirs = linear_model.orthogonal_mp(unit(shared).T, unit(new).T, n_nonzero_coefs=8).T
    assert np.allclose(dense(list(matching_pursuit(new, shared, 8)), 50), theirs, atol=1e-5)


@pytest.mark.parametrize("cells", [1, 2**22])
def test_matching_pursuit_stops_at_an_exact_combination(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiple of a row, and the diagonal of two orthogonal rows; more rows than dimensions exist."""
    monkeypatch.setattr(vector_alignment, "MAX_BLOCK_CELLS", cells)
    shared = np.vstack([np.eye(4), [[1, 1, 1, 1], [1, -1, 1, -1]], np.eye(4)]).astype(np.float32)
    new = np.array([[0, 0, -7, 0], [3, 0, 3, 0]], np.float32)
    found = dense(list(matching_pursuit(new, shared, 64)), len(shared))
    assert np.allclose(found @ unit(shared), unit(new), atol=1e-6)
    assert np.count_nonzero(found[0]) == 1
    assert found[0].min() == -1
    assert np.count_nonzero(found[1]) == 2


def test_matching_pursuit_of_a_vector_outside_the_span() -> None:
    """After the two rows that span all, what is left of any further row is a rounding error, and is not used."""
    shared = vectors(9, 2) @ vectors(2)
    new = vectors(5)
    found = dense(list(matching_pursuit(new, shared, 8)), len(shared))
    projected = np.linalg.lstsq(unit(shared).T, unit(new).T, rcond=1e-5)[0].T @ unit(shared)
    assert np.allclose(found @ unit(shared), projected, atol=1e-5)
    assert (np.count_nonzero(found, axis=1) == 2).all()
