"""AdamW against another library's (MLX's own, bias correction on), and what is not decayed."""

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest

from anarchobot.optim.adamw import BETA1, BETA2, EPSILON, adamw


def test_ten_steps_equal_the_librarys() -> None:
    rng = np.random.default_rng(0)
    w = {"w": mx.array(rng.standard_normal((5, 7)), mx.float32)}
    other, first, second = dict(w), {"w": mx.zeros((5, 7))}, {"w": mx.zeros((5, 7))}
    library = mlx.optimizers.AdamW(0.01, betas=[BETA1, BETA2], eps=EPSILON, weight_decay=0.1, bias_correction=True)
    for count in range(1, 11):
        g = {"w": mx.array(rng.standard_normal((5, 7)), mx.float32)}
        w, first, second = adamw(w, g, first, second, mx.array(0.01), mx.array(float(count)), 0.1)
        other = library.apply_gradients(g, other)
    np.testing.assert_allclose(np.array(w["w"]), np.array(other["w"]), rtol=2e-5, atol=1e-6)


def test_the_first_step_is_lr_long_and_vectors_are_not_decayed() -> None:
    """m / (1 - b1) over sqrt(v / (1 - b2)) is the gradient's sign at first; without the correction it is 0.45 of it."""
    params = {"matrix": mx.full((2, 2), 10.0), "norm": mx.full((2,), 10.0)}
    zeros = {name: mx.zeros(p.shape) for name, p in params.items()}
    grads = {name: mx.full(p.shape, -3.0) for name, p in params.items()}
    new, _, _ = adamw(params, grads, zeros, zeros, mx.array(0.01), mx.array(1.0), 0.5)
    assert np.array(new["norm"]) == pytest.approx(10.01, rel=1e-6)
    assert np.array(new["matrix"]) == pytest.approx(10.01 - 0.01 * 0.5 * 10, rel=1e-6)
