"""exp, tanh, sigmoid and row sums, in the form that is fast on the current device.

MLX's CPU backend calls the C library's functions element by element, at 15 to 30 ns each: half of a training step on a
CPU would go into exponentials. Compilers vectorize sums, products, quotients and integer shifts; written with these,
exp takes 1.4 ns (3 without a C++ compiler for `mx.compile`). On a GPU, MLX's functions are best.

MLX cannot differentiate these forms; inside `differentiable()`, MLX's functions are used instead.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx

from anarchobot.numerics.device import on_cpu

# 2^f for |f| <= 1/2 as a polynomial (least maximal relative error, 2e-9 before rounding), lowest power first.
_EXP2 = (1.0, 0.69314715, 0.24022651, 0.055504057, 0.0096181331, 0.0013400432, 0.00015470551)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds a float32 to an integer, held in the last bits of the sum
_LOWEST = -87.0  # e^-87 is 1.6e-38, the last normal float32
_LEAST_BITS = 40 << 23  # of 2^-87, about e^-60

# tanh x = x P(x^2) / Q(x^2) for |x| <= 7.9, beyond which it is 1 in float32 (the rational of Eigen's fast tanh).
_TANH_P = (
    4.89352455891786e-03, 6.37261928875436e-04, 1.48572235717979e-05, 5.12229709037114e-08,
    -8.60467152213735e-11, 2.00018790482477e-13, -2.76076847742355e-16,
)  # fmt: skip
_TANH_Q = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
_TANH_END = 7.90531110763549805


def exp(x: mx.array) -> mx.array:
    """e^x for float32 x up to 88. On a CPU it is exactly 0 below -60: products with smaller numbers are often
    subnormal, and many CPUs take 100 times as long for those."""
    return _exp(x) if _vectorized(x) else mx.exp(x)


def tanh(x: mx.array) -> mx.array:
    """The hyperbolic tangent, with an error of 3e-7."""
    return _tanh(x) if _vectorized(x) else mx.tanh(x)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + e^-x), with an absolute error of 2e-7 (on a CPU, the far tail is lost)."""
    return 0.5 + 0.5 * _tanh(0.5 * x) if _vectorized(x) else mx.sigmoid(x)


def row_sums(x: mx.array) -> mx.array:
    """Sums over the last axis: [..., n] -> [..., 1]."""
    # On a CPU, a product with a vector of ones is three times as fast as MLX's sum.
    return x @ mx.ones((x.shape[-1], 1), x.dtype) if _vectorized(x) else mx.sum(x, axis=-1, keepdims=True)


class Softmax(NamedTuple):
    """The softmax of logits z [C, n] is exps / sums: e^(z - max) [C, n] and its row sums [C, 1]. The last is
    log sum e^z [C, 1]."""

    exps: mx.array
    sums: mx.array
    log_normalizer: mx.array


def softmax(z: mx.array) -> Softmax:
    """For float32 z [C, n]."""
    peak = mx.max(z, axis=1, keepdims=True)
    exps = exp(z - peak)
    sums = row_sums(exps)
    return Softmax(exps, sums, peak + mx.log(sums))


_mode = threading.local()  # each worker thread has its own


@contextmanager
def differentiable() -> Iterator[None]:
    """A context manager in which MLX can differentiate the functions above."""
    before = getattr(_mode, "differentiable", False)
    _mode.differentiable = True
    try:
        yield
    finally:
        _mode.differentiable = before


def _vectorized(x: mx.array) -> bool:
    return x.dtype == mx.float32 and on_cpu() and not getattr(_mode, "differentiable", False)


# MLX fuses at most eleven operations in a row into one pass, and cutting there is slow, so these are several small
# functions. mx.maximum stays outside: inside, it prevents vectorization.


def _exp(x: mx.array) -> mx.array:
    """e^x = 2^n 2^f with n whole and |f| <= 1/2; n goes into the exponent's bits."""
    fraction, shifted = _split(mx.maximum(x, _LOWEST))
    return _with_exponent(_exp2(fraction), shifted)


@mx.compile
def _split(x: mx.array) -> tuple[mx.array, mx.array]:
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    return ((x - n * _LN2_HIGH) - n * _LN2_LOW) * _LOG2_E, shifted


@mx.compile
def _exp2(x: mx.array) -> mx.array:
    return _polynomial(x, _EXP2)


@mx.compile
def _with_exponent(x: mx.array, shifted: mx.array) -> mx.array:
    bits = x.view(mx.uint32) + (shifted.view(mx.uint32) << 23)  # unsigned: the bits of NaN, of either sign, are large
    return mx.where(bits >= _LEAST_BITS, bits, 0).view(mx.float32)


def _tanh(x: mx.array) -> mx.array:
    return _over_q(*_times_p(mx.minimum(mx.maximum(x, -_TANH_END), _TANH_END)))


@mx.compile
def _times_p(x: mx.array) -> tuple[mx.array, mx.array]:
    square = x * x
    return x * _polynomial(square, _TANH_P), square


@mx.compile
def _over_q(x: mx.array, square: mx.array) -> mx.array:
    return x / _polynomial(square, _TANH_Q)


def _polynomial(x: mx.array, coefficients: tuple[float, ...]) -> mx.array:
    """Estrin's scheme: pairs, then pairs of pairs; few operations in a row."""
    terms: list[Any] = list(coefficients)
    while len(terms) > 1:
        terms = [terms[i] + terms[i + 1] * x if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)]
        x = x * x  # unused after the last round
    value: mx.array = terms[0]
    return value
