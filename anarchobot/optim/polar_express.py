"""The orthogonal factor of matrices by Polar Express (Amsel et al., 2025), for Muon's updates."""

from itertools import pairwise

import mlx.core as mx

from anarchobot.numerics.device import on_cpu, reduced_float32
from anarchobot.optim.param_groups import MIN_SIZE_FOR_STRIPS, NORM_EPS, NORM_MARGIN, POLAR_EXPRESS, STRIPS


def orthogonalize(g: mx.array) -> mx.array:
    """Returns the nearest matrix whose singular values are all one (U V^T of g = U S V^T), to about 15%, for each
    matrix.

    `g` [n, rows, cols] float32 -> the same shape. Dividing by the Frobenius norm, with a margin of 2%, first brings
    all singular values below one. Each step multiplies X from the left by a polynomial in A = X X^T.
    """
    tall = g.shape[1] > g.shape[2]
    x = g.swapaxes(1, 2) if tall else g
    # Rounding the operands to TF32 puts singular values of up to 3.6 into the result of the small side.
    x = _steps_on_x(x) if reduced_float32() else _steps_on_small_side(x)
    return x.swapaxes(1, 2) if tall else x


def _steps_on_small_side(x: mx.array) -> mx.array:
    """All steps for X [n, s, k] in [n, s, s]: with M = a + b A + c A^2, A becomes M A M, and the product of all M is
    applied to X once. For a matrix of 768 x 3,072 that takes 38% of the multiplications of steps on X, symmetry
    included. X is not normalized itself: its norm is the root of A's trace."""
    gram = gram_matrix(x)
    size = gram.shape[-1]
    norm = _margin(mx.sum(gram.reshape(-1, 1, size * size)[:, :, :: size + 1], axis=2, keepdims=True))
    gram = gram * (1 / (norm * norm))
    identity = mx.arange(size)[:, None] == mx.arange(size)
    poly = None
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        inner = symmetric_product(gram, gram, c, b, gram)  # M = a + inner
        poly = inner + a * identity if poly is None else symmetric_product(poly, inner, 1, a, poly)
        if i + 1 < len(POLAR_EXPRESS):
            half = symmetric_product(gram, inner, 1, a, gram)  # A M
            gram = symmetric_product(half, inner, 1, a, half)  # M A M: all of these commute
    assert poly is not None
    return (poly * (1 / norm)) @ x


def _steps_on_x(x: mx.array) -> mx.array:
    """All steps on X [n, s, k] itself. Each computes A again, so rounding errors do not carry over."""
    x = x / _margin(mx.sum(x * x, axis=(1, 2), keepdims=True))
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.swapaxes(1, 2)
        x = mx.addmm(x, mx.addmm(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x


def _margin(squares: mx.array) -> mx.array:
    """The Frobenius norm from the sum of squares, with the margin: above all singular values."""
    return mx.sqrt(squares) * NORM_MARGIN + NORM_EPS


def symmetric_product(a: mx.array, b: mx.array, alpha: float, beta: float, c: mx.array) -> mx.array:
    """alpha a b + beta c for symmetric a, b and c [n, s, s] that commute: the result is symmetric as well."""
    # With a transposed b, the rounding errors of the two halves would amplify each other, tenfold in each step.
    if _in_strips(a):
        return beta * c + alpha * _mirrored(a, b)
    return mx.addmm(c, a, b, alpha=alpha, beta=beta)


def gram_matrix(x: mx.array) -> mx.array:
    """x x^T of [n, s, k]."""
    return _mirrored(x, x) if _in_strips(x) else x @ x.swapaxes(1, 2)


def _in_strips(x: mx.array) -> bool:
    """Whether half a product and its mirror image are faster than the whole product."""
    return x.shape[1] >= MIN_SIZE_FOR_STRIPS and on_cpu()


def _mirrored(a: mx.array, b: mx.array) -> mx.array:
    """a b^T, computed on and below the diagonal only, in strips."""
    size = a.shape[1]
    bounds = list(pairwise(size * i // STRIPS for i in range(STRIPS + 1)))
    strips = [a[:, start:end] @ b[:, :end].swapaxes(1, 2) for start, end in bounds]
    rows = [
        mx.concatenate([strips[i], *(below[:, :, start:end].swapaxes(1, 2) for below in strips[i + 1 :])], axis=2)
        for i, (start, end) in enumerate(bounds)
    ]
    return mx.concatenate(rows, axis=1)
