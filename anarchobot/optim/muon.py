"""Muon (Jordan et al., 2024): orthogonalized momentum, for the matrices of the blocks only.

The momentum of a matrix usually has a few large directions and many small ones; Muon gives every direction the same
size. That suits matrices that map hidden states to hidden states. It does not suit embeddings and the head (their rows
are tokens, not directions) or norms: these belong to AdamW. Muon on these silently degrades quality.

MLX 0.32 has a Muon; it adds weight decay to the gradient before orthogonalizing, where decay should act on the weight
alone, and takes one matrix at a time, so we implement our own.
"""

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.elementary import row_sums
from anarchobot.numerics.eval_order import EvalOrder
from anarchobot.optim.adamw import apply_update
from anarchobot.optim.param_groups import (
    NORMUON_BETA2,
    NORMUON_EPS,
    merge_heads,
    muon_batches,
    muon_scale,
    split_heads,
)
from anarchobot.optim.polar_express import orthogonalize

Arrays = dict[str, mx.array]


def muon(
    params: Arrays,
    grads: Arrays,
    buffers: Arrays,
    second_moments: Arrays,
    lr: mx.array,
    momentum: mx.array,
    train: TrainConfig,
    head_size: int,
    wait: EvalOrder,
    directions: Arrays | None = None,
    factor: mx.array | float = 1.0,
) -> tuple[Arrays, Arrays, Arrays]:
    """Updates matrices [rows, cols] by `factor` times the gradients g. All dicts have the same names and are consumed;
    `second_moments` [rows] is empty without train.normuon. `head_size` is the width of the heads for
    train.muon_split_heads. `directions`: the u, if already computed by `muon_directions`. Returns the new (params,
    buffers, second_moments).

        m <- mu m + (1 - mu) g;   u = orthogonalize(mu m + (1 - mu) g)         (Nesterov momentum)
        s <- b2 s + (1 - b2) mean of a row's u^2;   u <- u / sqrt(s), at u's norm      (NorMuon, Li et al., 2025)
        W <- W - lr (scale u + weight_decay W)                                    (optim/adamw.py)
    """
    new_params: Arrays = {}
    new_buffers: Arrays = {}
    new_second_moments: Arrays = {}
    split = head_size if train.muon_split_heads else None
    shapes = {name: w.shape for name, w in params.items()}

    def update_batch(names: list[str]) -> list[mx.array]:
        """Returns the new weights; what only the update needs is not referred to when it returns."""
        u, momenta = _lookaheads(names, grads, buffers, factor, momentum)
        u = _stack([directions.pop(name) for name in names]) if directions else _direction(names[0], u, split)
        scales: list[mx.array | float] = [1.0] * len(names)
        if train.normuon:
            row_scales, second = _row_scales(u, _stack([second_moments.pop(name) for name in names]))
            scales = list(row_scales)
            new_second_moments.update(zip(names, second, strict=True))
        new_buffers.update(zip(names, momenta, strict=True))
        scale = muon_scale(shapes[names[0]], train.muon_scale)
        return [
            apply_update(params.pop(name), u * (s * scale), lr, train)
            for name, u, s in zip(names, u, scales, strict=True)
        ]

    weights: list[mx.array] = []
    for names in muon_batches(shapes, train.muon_split_heads):  # [n, rows, cols] each
        grads |= dict(zip(names, wait([grads[name] for name in names], weights), strict=True))
        weights = update_batch(names)
        new_params |= dict(zip(names, weights, strict=True))
    return new_params, new_buffers, new_second_moments


def muon_directions(
    grads: Arrays,
    buffers: Arrays,
    factor: mx.array | float,
    momentum: mx.array,
    train: TrainConfig,
    head_size: int,
    wait: EvalOrder,
) -> Arrays:
    """Returns the u of `muon` for these matrices; does not modify the dicts."""
    directions: Arrays = {}
    split = head_size if train.muon_split_heads else None
    grads, buffers = dict(grads), dict(buffers)
    for names in muon_batches({name: g.shape for name, g in grads.items()}, train.muon_split_heads):
        u = _direction(names[0], _lookaheads(names, grads, buffers, factor, momentum)[0], split)
        (u,) = wait([u], [u])
        directions |= dict(zip(names, u, strict=True))
    return directions


def _lookaheads(
    names: list[str], grads: Arrays, buffers: Arrays, factor: mx.array | float, momentum: mx.array
) -> tuple[mx.array, list[mx.array]]:
    """Returns Nesterov's look-ahead of matrices of one shape, [n, rows, cols], and their new momenta; consumes their
    gradients and momenta."""
    both = [_momentum(grads.pop(name), buffers.pop(name), factor, momentum) for name in names]
    return _stack([lookahead for _, lookahead in both]), [m for m, _ in both]


@mx.compile
def _momentum(g: mx.array, m: mx.array, factor: mx.array | float, momentum: mx.array) -> tuple[mx.array, mx.array]:
    g = factor * g
    m = momentum * m + (1 - momentum) * g
    return m, momentum * m + (1 - momentum) * g


def _stack(arrays: list[mx.array]) -> mx.array:
    return mx.stack(arrays) if len(arrays) > 1 else arrays[0][None]  # without a copy


def _direction(name: str, lookahead: mx.array, head_size: int | None) -> mx.array:
    u: mx.array = merge_heads(name, orthogonalize(split_heads(name, lookahead, head_size)), lookahead.shape)
    return u


def _row_scales(u: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    """The factors [n, rows, 1] that divide the rows of u [n, rows, cols] by the root of their running mean square
    `second` [n, rows], and rescale each matrix to its previous norm; and the new mean squares."""
    squares = row_sums(u * u)  # [n, rows, 1]
    mean = NORMUON_BETA2 * second[..., None] + (1 - NORMUON_BETA2) / u.shape[-1] * squares
    scale = 1 / (mx.sqrt(mean) + NORMUON_EPS)
    before, after = (mx.sum(x, axis=1, keepdims=True) for x in (squares, squares * scale * scale))
    return scale * (mx.sqrt(before) / (mx.sqrt(after) + NORMUON_EPS)), mean[..., 0]
