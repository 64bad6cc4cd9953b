"""Orthogonalization against a singular value decomposition in float64."""

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.numerics import device
from anarchobot.optim.param_groups import POLAR_EXPRESS
from anarchobot.optim.polar_express import gram_matrix, orthogonalize, symmetric_product

SHAPES = [(32, 32), (24, 96), (96, 24), (1, 16), (16, 1)]


def svd_matrix(rows: int, cols: int, seed: int = 0, smallest: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    """A matrix whose singular values run from 1 down to `smallest`, and the nearest orthogonal matrix."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.standard_normal((rows, cols)), full_matrices=False)
    return (u * np.geomspace(1, smallest, min(rows, cols))) @ vt * 3.7, u @ vt


def iterate(g: np.ndarray) -> np.ndarray:
    """Polar Express as in its paper, in float64, for one matrix."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_is_close_to_the_polar_factor(shape: tuple[int, int]) -> None:
    g, nearest = svd_matrix(*shape)
    got = np.array(orthogonalize(mx.array(g, mx.float32)[None])[0], np.float64)
    values = np.linalg.svd(got, compute_uv=False)
    assert values.min() > 0.85 and values.max() < 1.15  # published bounds for five steps
    assert np.vdot(got, nearest) / (np.linalg.norm(got) * np.linalg.norm(nearest)) > 0.99
    np.testing.assert_allclose(got, iterate(g), atol=5e-5)


@pytest.mark.parametrize("shape", [(48, 128), (512, 520)])
@pytest.mark.parametrize("smallest", [1e-2, 1e-4, 1e-6])
def test_ill_conditioned_matrices_match_float64(smallest: float, shape: tuple[int, int]) -> None:
    """In X X^T, a singular value of 1e-4 becomes 1e-8; rounding must not lose it. MLX's reference BLAS, which adds
    products one by one, has errors of 0.009, others of 0.001 to 0.004; the iteration itself is accurate to 0.15."""
    g, _ = svd_matrix(*shape, smallest=smallest)
    got, exact = np.array(orthogonalize(mx.array(g, mx.float32)[None])[0], np.float64), iterate(g)
    assert np.linalg.norm(got - exact) < 0.02 * np.linalg.norm(exact)
    assert np.linalg.svd(got, compute_uv=False).max() < 1.15


def test_stacked_matrices_are_independent() -> None:
    a, b = svd_matrix(24, 96, 1)[0], 1000 * svd_matrix(24, 96, 2)[0]
    both = orthogonalize(mx.array(np.stack([a, b]), mx.float32))
    np.testing.assert_allclose(np.array(both[1]), iterate(b), atol=5e-5)


def test_a_tiny_matrix_is_divided_by_epsilon() -> None:
    """Rounding errors must not become an update of full size."""
    g = 1e-9 * svd_matrix(24, 96)[0]
    got, exact = np.array(orthogonalize(mx.array(g, mx.float32)[None])[0], np.float64), iterate(g)
    assert np.linalg.norm(got - exact) < 1e-3 * np.linalg.norm(exact)


def test_a_zero_matrix_stays_zero() -> None:
    assert not np.array(orthogonalize(mx.zeros((1, 8, 16)))).any()


@pytest.mark.parametrize("size", [7, 512, 515])
def test_symmetric_products_equal_full_products(size: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, size, 20))
    gram = gram_matrix(mx.array(x, mx.float32))
    exact = x @ x.swapaxes(1, 2)
    np.testing.assert_allclose(np.array(gram), exact, atol=1e-4)
    square = symmetric_product(gram, gram, 2.0, 3.0, gram)
    cube = symmetric_product(gram, square, 1.0, 0.0, gram)
    exact = exact @ (2 * exact @ exact + 3 * exact)
    np.testing.assert_allclose(np.array(cube), exact, atol=1e-4 * np.abs(exact).max())


def test_exact_products_are_not_taken_for_rounded_ones() -> None:
    assert not device._rounds_operands() and not device.reduced_float32()
    with device.gpu_path():
        assert not device.reduced_float32()
    with device.gpu_path(tf32=True):
        assert device.reduced_float32() and not device.on_cpu()
    assert not device.reduced_float32()


def test_products_rounded_to_tf32_are_detected(tf32: None) -> None:
    assert device._rounds_operands.__wrapped__()


@pytest.mark.parametrize("smallest", [1e-3, 1e-5, 1e-8], ids=str)
@pytest.mark.parametrize("shape", [(64, 768), (384, 384), (1536, 384)], ids=str)
def test_products_rounded_to_tf32_give_the_same_singular_values(
    tf32: None, shape: tuple[int, int], smallest: float
) -> None:
    """Steps on the small side give largest singular values from 1.26 to 3.9 here."""
    g = mx.array(svd_matrix(*shape, smallest=smallest)[0], mx.float32)
    with device.gpu_path(tf32=True):
        got = np.array(orthogonalize(g[None])[0], np.float64)
    exact = iterate(np.array(g, np.float64))
    assert np.linalg.svd(got, compute_uv=False)[0] < 1.15
    assert np.vdot(got, exact) > 0.95 * np.linalg.norm(got) * np.linalg.norm(exact)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_kinds_of_steps_agree(shape: tuple[int, int]) -> None:
    g = mx.array(np.stack([svd_matrix(*shape, seed)[0] for seed in range(2)]), mx.float32)
    with device.gpu_path(tf32=True):
        on_x = orthogonalize(g)
    np.testing.assert_allclose(np.array(on_x), np.array(orthogonalize(g)), atol=5e-5)


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds the operands of every product to 10 bits of mantissa, as TF32 does."""

    def rounded(x: mx.array) -> mx.array:
        return (((x.view(mx.uint32) + (1 << 12)) >> 13) << 13).view(mx.float32)

    def addmm(c: mx.array, a: mx.array, b: mx.array, /, alpha: float = 1.0, beta: float = 1.0) -> mx.array:
        return true_addmm(c, rounded(a), rounded(b), alpha=alpha, beta=beta)

    true_matmul, true_addmm = mx.array.__matmul__, mx.addmm
    monkeypatch.setattr(mx.array, "__matmul__", lambda a, b: true_matmul(rounded(a), rounded(b)))
    monkeypatch.setattr(mx, "addmm", addmm)
