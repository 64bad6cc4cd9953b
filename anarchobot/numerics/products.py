"""Products of matrices that are added up."""

import mlx.core as mx


def add_product(total: mx.array | None, a: mx.array, b: mx.array) -> mx.array:
    """total + a b, float32; without a total, a b alone. float32 products are added by the product itself, in place."""
    if total is None:
        return (a @ b).astype(mx.float32)
    if a.dtype == mx.float32:
        return mx.addmm(total, a, b)
    return total + (a @ b).astype(mx.float32)
