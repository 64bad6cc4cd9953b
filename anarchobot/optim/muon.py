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
) -> tuple[Arrays, Arrays, Arrays]:
    """Updates matrices [rows, cols]. All dicts have the same names and are consumed; `second_moments` [rows] is empty
    without train.normuon. `head_size` is the width of the heads for train.muon_split_heads. `directions`: the u, if
    already computed by `muon_directions`. Returns the new (params, buffers, second_moments).

        m <- mu m + (1 - mu) g;   u = orthogonalize(mu m + (1 - mu) g)         (Nesterov momentum)
        s <- b2 s + (1 - b2) mean of a row's u^2;   u <- u / sqrt(s), at u's norm      (NorMuon, Li et al., 2025)
        W <- W - lr (scale u + weight_decay W)                                    (optim/adamw.py)
    """
    new_params: Arrays = {}
    new_buffers: Arrays = {}
    new_second_moments: Arrays = {}
    split = head_size if train.muon_split_heads else None
    shapes = {name: w.shape for name, w in params.items()}
    for names in muon_batches(shapes, train.muon_split_heads):  # [n, rows, cols] each
        w, g, m = (mx.stack([arrays.pop(name) for name in names]) for arrays in (params, grads, buffers))
        m = momentum * m + (1 - momentum) * g
        if directions:
            u = mx.stack([directions.pop(name) for name in names])
        else:
            u = _direction(names[0], momentum * m + (1 - momentum) * g, split)
        del g
        if train.normuon:
            u, s = _normalize_rows(u, mx.stack([second_moments.pop(name) for name in names]))
            new_second_moments |= dict(zip(names, s, strict=True))
        w = apply_update(w, u * muon_scale(w.shape[1:], train.muon_scale), lr, train)
        del u
        w, m = wait([w, m], [w, m])
        new_params |= dict(zip(names, w, strict=True))
        new_buffers |= dict(zip(names, m, strict=True))
    return new_params, new_buffers, new_second_moments


def muon_directions(
    grads: Arrays, buffers: Arrays, momentum: mx.array, train: TrainConfig, head_size: int, wait: EvalOrder
) -> Arrays:
    """Returns the u of `muon` for these matrices; does not modify the dicts."""
    directions: Arrays = {}
    split = head_size if train.muon_split_heads else None
    for names in muon_batches({name: g.shape for name, g in grads.items()}, train.muon_split_heads):
        g, m = (mx.stack([arrays[name] for name in names]) for arrays in (grads, buffers))
        m = momentum * m + (1 - momentum) * g
        (u,) = wait([_direction(names[0], momentum * m + (1 - momentum) * g, split)], [m])
        directions |= dict(zip(names, u, strict=True))
    return directions


def _direction(name: str, lookahead: mx.array, head_size: int | None) -> mx.array:
    u: mx.array = merge_heads(name, orthogonalize(split_heads(name, lookahead, head_size)), lookahead.shape)
    return u


def _normalize_rows(u: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    """Divides the rows of u [n, rows, cols] by the root of their running mean square `second` [n, rows], and rescales
    each matrix to its previous norm. Returns u and the new mean squares."""
    squares = row_sums(u * u)  # [n, rows, 1]
    mean = NORMUON_BETA2 * second[..., None] + (1 - NORMUON_BETA2) / u.shape[-1] * squares
    scale = 1 / (mx.sqrt(mean) + NORMUON_EPS)
    before, after = (mx.sum(x, axis=1, keepdims=True) for x in (squares, squares * scale * scale))
    return u * (scale * (mx.sqrt(before) / (mx.sqrt(after) + NORMUON_EPS))), mean[..., 0]
