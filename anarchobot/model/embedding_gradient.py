"""The gradient of the token embedding: rows added up by token id, in the same order every time."""

import mlx.core as mx

from anarchobot.numerics.device import on_cpu

_CHUNK = 512  # tokens


def add_rows(total: mx.array, ids: mx.array, rows: mx.array) -> mx.array:
    """Adds `rows` [N, D], float32, to the rows `ids` [N] of `total` [V, D].

    A GPU's scatter adds atomically, so the order of several rows with the same id varies, and with it the rounding of
    their sum. There, a product with the [C, C] matrix of equal ids adds up the rows of each id of a chunk of C tokens.
    The scatter then has one such sum for each id, and otherwise zeros, which it can add in any order.
    """
    if on_cpu():
        return total.at[ids].add(rows)
    for start in range(0, ids.size, _CHUNK):
        chunk = ids[start : start + _CHUNK]
        same = chunk[:, None] == chunk
        first = ~mx.any(mx.tril(same, -1), axis=1, keepdims=True)  # no earlier token of the chunk has the id
        sums = (same & first).astype(mx.float32) @ rows[start : start + _CHUNK]
        total = total.at[chunk].add(sums)
    return total
