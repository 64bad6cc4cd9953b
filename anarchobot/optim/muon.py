"""Muon (Jordan et al., 2024): momentum, orthogonalized. For the blocks' matrices only.

A matrix's momentum usually has a few large directions and many small ones; Muon's update gives every direction the same
size. That suits matrices that map hidden states to hidden states. It does not suit embeddings and the head (their rows
are words, not directions), nor norms: these belong to AdamW. Handing them to Muon gives no error, only a worse model.

MLX 0.32 has a Muon; it adds weight decay to the gradient before orthogonalising, where decay should act on the weight
alone, and takes one matrix at a time. Hence this one.
"""

import math

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.elementary import row_sums
from anarchobot.numerics.sequencing import Wait
from anarchobot.optim.param_groups import MOST_AT_ONCE, muon_stacks
from anarchobot.optim.polar_express import orthogonalize
from anarchobot.optim.weight_decay import moved

BETA2, EPSILON = 0.95, 1e-8  # of NorMuon's second moment

Arrays = dict[str, mx.array]


def muon(
    params: Arrays,
    grads: Arrays,
    buffers: Arrays,
    seconds: Arrays,
    lr: mx.array,
    momentum: mx.array,
    train: TrainConfig,
    head_size: int,
    wait: Wait,
    directions: Arrays | None = None,
) -> tuple[Arrays, Arrays, Arrays]:
    """One update of matrices [rows, cols]; all dicts are used up, and have the same names, but for `seconds` [rows],
    which is empty without train.normuon. `head_size` is the width of the heads that train.muon_split_heads takes apart.
    `directions` are the u, where they are made already (by `muon_directions`). Returns the new (params, buffers,
    seconds).

        m <- mu m + (1 - mu) g;   u = orthogonalize(mu m + (1 - mu) g)         (Nesterov's look ahead)
        s <- b2 s + (1 - b2) mean of a row's u^2;   u <- u / sqrt(s), at u's norm      (NorMuon, Li et al., 2025)
        W <- W - lr (scale u + weight_decay W)                             (optim/weight_decay.py)
    """
    new_params: Arrays = {}
    new_buffers: Arrays = {}
    new_seconds: Arrays = {}
    split = head_size if train.muon_split_heads else None
    shapes = {name: w.shape for name, w in params.items()}
    for names in muon_stacks(shapes, train.muon_split_heads, MOST_AT_ONCE):  # [n, rows, cols] each
        w, g, m = (mx.stack([arrays.pop(name) for name in names]) for arrays in (params, grads, buffers))
        m = momentum * m + (1 - momentum) * g
        if directions:
            u = mx.stack([directions.pop(name) for name in names])
        else:
            u = _direction(names[0], momentum * m + (1 - momentum) * g, split)
        del g
        if train.normuon:
            u, s = _even_rows(u, mx.stack([seconds.pop(name) for name in names]))
            new_seconds |= dict(zip(names, s, strict=True))
        w = moved(w, u * update_scale(w.shape[1:], train.muon_scale), lr, train)
        del u
        w, m = wait([w, m], [w, m])
        new_params |= dict(zip(names, w, strict=True))
        new_buffers |= dict(zip(names, m, strict=True))
    return new_params, new_buffers, new_seconds


def muon_directions(
    grads: Arrays, buffers: Arrays, momentum: mx.array, train: TrainConfig, head_size: int, wait: Wait
) -> Arrays:
    """The u of `muon`, for these matrices; the dicts stay as they are."""
    directions: Arrays = {}
    split = head_size if train.muon_split_heads else None
    for names in muon_stacks({name: g.shape for name, g in grads.items()}, train.muon_split_heads, MOST_AT_ONCE):
        g, m = (mx.stack([arrays[name] for name in names]) for arrays in (grads, buffers))
        m = momentum * m + (1 - momentum) * g
        (u,) = wait([_direction(names[0], momentum * m + (1 - momentum) * g, split)], [m])
        directions |= dict(zip(names, u, strict=True))
    return directions


def _direction(name: str, ahead: mx.array, head_size: int | None) -> mx.array:
    return _joined(name, orthogonalize(_pieces(name, ahead, head_size)), ahead.shape)


def update_scale(shape: tuple[int, ...], kind: str = "adamw") -> float:
    """What an orthogonal update is multiplied by.

    adamw: 0.2 sqrt(max(rows, cols)): its elements then have the size of AdamW's, so that one learning rate and one
    weight decay serve both (Liu et al., "Muon is scalable for LLM training", 2025, equation 4). keller:
    sqrt(max(1, rows / cols)), Muon's own (Jordan et al., 2024), for learning rates about 0.02.
    """
    rows, cols = shape
    return 0.2 * math.sqrt(max(shape)) if kind == "adamw" else math.sqrt(max(1.0, rows / cols))


def _even_rows(u: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    """[n, rows, cols]: rows divided by the root of their running mean square [n, rows], each matrix at the norm that it
    had; and the new mean squares."""
    squares = row_sums(u * u)  # [n, rows, 1]
    mean = BETA2 * second[..., None] + (1 - BETA2) / u.shape[-1] * squares
    scale = 1 / (mx.sqrt(mean) + EPSILON)
    before, after = (mx.sum(x, axis=1, keepdims=True) for x in (squares, squares * scale * scale))
    return u * (scale * (mx.sqrt(before) / (mx.sqrt(after) + EPSILON))), mean[..., 0]


def _pieces(name: str, g: mx.array, head_size: int | None) -> mx.array:
    """[n, rows, cols] -> [m, ...]: whole matrices, or each head's part of attention projections: rows of q, k and v,
    columns of o."""
    if head_size is None or "self_attn" not in name:
        return g
    n, rows, cols = g.shape
    if "o_proj" in name:
        return g.reshape(n, rows, -1, head_size).swapaxes(1, 2).reshape(-1, rows, head_size)
    return g.reshape(-1, head_size, cols)


def _joined(name: str, pieces: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Undoes `_pieces`."""
    n, rows, cols = shape
    if "o_proj" in name and pieces.shape[2] < cols:
        return pieces.reshape(n, -1, rows, pieces.shape[2]).swapaxes(1, 2).reshape(shape)
    return pieces.reshape(shape)
