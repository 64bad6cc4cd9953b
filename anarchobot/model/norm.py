"""RMSNorm (Zhang and Sennrich, 2019) and its gradient."""

import mlx.core as mx

from anarchobot.numerics.device import on_cpu
from anarchobot.numerics.elementary import row_sums


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in x's dtype; sums in float32."""
    weight = weight.astype(x.dtype)  # a float32 weight would promote everything after it
    if on_cpu() and x.dtype == mx.float32:
        return x * _inverse_rms(x, eps) * weight
    return mx.fast.rms_norm(x, weight, eps)


def rms_norm_backward(x: mx.array, weight: mx.array, eps: float, dy: mx.array) -> tuple[mx.array, mx.array]:
    """Returns the gradients of x [N, D] and of the weight [D] (float32), given the gradient `dy` [N, D] of the
    output."""
    if on_cpu() and x.dtype == mx.float32:
        inverse = _inverse_rms(x, eps)
        normed = x * inverse
        scaled = dy * weight
        dx = inverse * (scaled - normed * (row_sums(scaled * normed) * (1 / x.shape[-1])))
        return dx, mx.sum(dy * normed, axis=0)
    _, (dx, dweight) = mx.vjp(lambda x, weight: mx.fast.rms_norm(x, weight, eps), [x, weight.astype(x.dtype)], [dy])
    return dx, dweight.astype(mx.float32)


def _inverse_rms(x: mx.array, eps: float) -> mx.array:
    return mx.rsqrt(row_sums(x * x) * (1 / x.shape[-1]) + eps)
