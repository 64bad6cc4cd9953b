"""The functions of numerics/ against numpy in float64, over the range in which they are used."""

import mlx.core as mx
import numpy as np
import pytest

from anarchobot.model.gradient_accumulator import add_product
from anarchobot.numerics import elementary
from anarchobot.numerics.eval_order import depend, eval_now, unordered

X = np.concatenate([np.linspace(-87, 88, 200_003), np.linspace(-3, 3, 100_003), [0.0]]).astype(np.float32)
EXACT = X.astype(np.float64)


@pytest.fixture(autouse=True)
def on_cpu() -> None:
    mx.set_default_device(mx.cpu)


def test_exp_accuracy_and_underflow() -> None:
    actual = np.array(elementary.exp(mx.array(X)))
    above = X > -60
    np.testing.assert_allclose(actual[above], np.exp(EXACT[above]), rtol=3e-7)
    assert not actual[X < -60.31].any()  # 2^-87 is e^-60.30
    assert not np.array(elementary.exp(mx.array([-87.5, -1e3, -1e9, -np.inf]))).any()
    assert float(elementary.exp(mx.array(0.0))) == 1.0


def test_tanh_and_sigmoid_accuracy() -> None:
    x = np.append(X, np.float32([1e6, -1e6]))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(np.array(elementary.tanh(mx.array(x))), np.tanh(exact), atol=5e-7)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(np.array(elementary.sigmoid(mx.array(x))), 1 / (1 + np.exp(-exact)), atol=5e-7)


def test_nan_propagates() -> None:
    """Otherwise a broken step would look valid."""
    nan = mx.array(np.array([0x7FC00000, 0xFFC00000], np.uint32).view(np.float32))  # of either sign
    for function in (elementary.exp, elementary.tanh, elementary.sigmoid, elementary.row_sums):
        assert not np.isfinite(np.array(function(nan))).any(), function


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 700)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_row_sums_keep_the_axis_and_the_dtype(shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    x = mx.array(np.random.default_rng(0).integers(-2, 3, shape), dtype)  # whole numbers: exact in any order
    sums = elementary.row_sums(x)
    assert sums.dtype == dtype
    np.testing.assert_array_equal(np.array(sums.astype(mx.float32)), np.array(x.astype(mx.float32)).sum(-1)[..., None])


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_products_are_added_in_float32(dtype: mx.Dtype) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-3, 4, (4, 6)).astype(np.float64), rng.integers(-3, 4, (6, 5)).astype(np.float64)
    left, right = mx.array(a, dtype), mx.array(b, dtype)
    once = add_product(None, left, right)
    twice = add_product(mx.full((4, 5), 1e-4), left, right)
    assert once.dtype == twice.dtype == mx.float32
    np.testing.assert_array_equal(np.array(once), a @ b)
    np.testing.assert_allclose(np.array(twice), a @ b + 1e-4, rtol=1e-6)  # a few units of rounding in float32


def test_evaluation_order_does_not_change_arrays() -> None:
    a, b = mx.arange(4), mx.ones((2, 2))
    for wait in (depend, eval_now, unordered):
        x, y = wait([a, b], [a + 1])
        assert mx.array_equal(x, a) and mx.array_equal(y, b)
        assert wait([a], [])[0].tolist() == a.tolist()
