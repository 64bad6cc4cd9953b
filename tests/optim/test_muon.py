"""Muon against a singular value decomposition, and its step against one written out in float64."""

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.optim.muon import POLAR_EXPRESS, muon, orthogonalise, update_scale

SHAPES = [(32, 32), (24, 96), (96, 24), (1, 16), (16, 1)]


def svd_matrix(rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix whose singular values run from 1 down to 0.02, and the orthogonal one nearest to it."""
    rng = np.random.default_rng(seed)
    u, _, vt = np.linalg.svd(rng.standard_normal((rows, cols)), full_matrices=False)
    return (u * np.geomspace(1, 0.02, min(rows, cols))) @ vt * 3.7, u @ vt


def iterate(g: np.ndarray) -> np.ndarray:
    """Polar Express in float64, written for one matrix."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalised_is_near_the_polar_factor_and_keeps_the_directions(shape: tuple[int, int]) -> None:
    g, nearest = svd_matrix(*shape)
    got = np.array(orthogonalise(mx.array(g, mx.float32)[None])[0], np.float64)
    values = np.linalg.svd(got, compute_uv=False)
    assert values.min() > 0.85 and values.max() < 1.15  # the published band of five steps
    assert np.vdot(got, nearest) / (np.linalg.norm(got) * np.linalg.norm(nearest)) > 0.99
    np.testing.assert_allclose(got, iterate(g), atol=2e-5)


def test_stacked_matrices_do_not_mix() -> None:
    a, b = svd_matrix(24, 96, 1)[0], 1000 * svd_matrix(24, 96, 2)[0]
    both = orthogonalise(mx.array(np.stack([a, b]), mx.float32))
    np.testing.assert_allclose(np.array(both[1]), iterate(b), atol=2e-5)


def test_three_steps_equal_the_formula_in_float64() -> None:
    """Two shapes at once; Nesterov, momentum changing from step to step, decoupled decay, AdamW-sized update."""
    rng = np.random.default_rng(0)
    truth = {"a": rng.standard_normal((8, 24)), "b": rng.standard_normal((8, 24)), "c": rng.standard_normal((24, 8))}
    buffers = {name: np.zeros_like(p) for name, p in truth.items()}
    params = {name: mx.array(p, mx.float32) for name, p in truth.items()}
    state = {name: mx.zeros(p.shape) for name, p in params.items()}
    for lr, mu in ((0.1, 0.85), (0.05, 0.9), (0.01, 0.95)):
        grads = {name: rng.standard_normal(p.shape) for name, p in truth.items()}
        for name, g in grads.items():
            buffers[name] = mu * buffers[name] + (1 - mu) * g
            u = iterate(mu * buffers[name] + (1 - mu) * g) * 0.2 * np.sqrt(24)
            truth[name] = truth[name] - lr * u - lr * 0.3 * truth[name]
        as_mlx = {name: mx.array(g, mx.float32) for name, g in grads.items()}
        params, state = muon(params, as_mlx, state, mx.array(lr), mx.array(mu), 0.3)
    for name, p in truth.items():
        np.testing.assert_allclose(np.array(params[name]), p, atol=3e-5)
        np.testing.assert_allclose(np.array(state[name]), buffers[name], atol=1e-6)


def test_weight_decay_is_decoupled() -> None:
    """MLX's own Muon puts the decay into the gradient, where orthogonalising blows it up to a full-sized step."""
    w = mx.array(svd_matrix(16, 32)[0], mx.float32)
    zero = {"w": mx.zeros(w.shape)}
    new, _ = muon({"w": w}, zero, zero, mx.array(0.1), mx.array(0.9), 0.5)
    np.testing.assert_allclose(np.array(new["w"]), 0.95 * np.array(w), rtol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_the_update_has_adamws_size(shape: tuple[int, int]) -> None:
    g = np.random.default_rng(0).standard_normal(shape)
    update = np.array(orthogonalise(mx.array(g, mx.float32)[None])[0]) * update_scale(shape)
    assert np.sqrt((update**2).mean()) == pytest.approx(0.2, rel=0.1)
