"""Accumulates gradients by parameter name."""

from collections.abc import Container

import mlx.core as mx

Params = dict[str, mx.array]


class GradientAccumulator:
    """Float32 sums of gradients by parameter name. `scoped` returns a view for the names inside a block.

    Only the parameters in `trained` (None: all) get a gradient; others are ignored and not computed. Adding returns the
    new sums, so that later work can wait for them.
    """

    def __init__(self, sums: Params, prefix: str = "", trained: Container[str] | None = None) -> None:
        self.sums, self._prefix, self._trained = sums, prefix, trained

    def scoped(self, prefix: str) -> "GradientAccumulator":
        return GradientAccumulator(self.sums, prefix, self._trained)

    def is_trainable(self, name: str) -> bool:
        return self._trained is None or self._prefix + name in self._trained

    def add(self, name: str, gradient: mx.array) -> list[mx.array]:
        """Adds the gradient of a parameter."""
        if not self.is_trainable(name):
            return []
        name, gradient = self._prefix + name, gradient.astype(mx.float32)
        self.sums[name] = self.sums.pop(name) + gradient if name in self.sums else gradient
        return [self.sums[name]]

    def add_product(self, name: str, left: mx.array, right: mx.array) -> list[mx.array]:
        """Adds left^T right: dy^T x is the gradient of W in y = x W^T."""
        if not self.is_trainable(name):
            return []
        name = self._prefix + name
        self.sums[name] = add_product(self.sums.pop(name, None), left.T, right)
        return [self.sums[name]]


def add_product(total: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    """total + a b in float32; without a total, a b alone. A float32 product adds in place."""
    if total is None:
        return (a @ b).astype(mx.float32)
    if a.dtype == mx.float32:
        return mx.addmm(total, a, b)
    return total + (a @ b).astype(mx.float32)
