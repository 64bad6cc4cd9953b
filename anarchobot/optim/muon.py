"""Muon (Jordan et al., 2024): momentum, orthogonalised. For the blocks' matrices only.

A matrix's momentum usually has a few large directions and many small ones; Muon's update gives every direction the same
size. That suits matrices that map hidden states to hidden states. It does not suit embeddings and the head (their rows
are words, not directions), nor norms: these belong to AdamW. Handing them to Muon gives no error, only a worse model.

MLX 0.32 has a Muon; it adds weight decay to the gradient before orthogonalising, where decay should act on the weight
alone, and takes one matrix at a time. Hence this one.
"""

import math

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.order import Wait
from anarchobot.optim.orthogonal import orthogonalise
from anarchobot.optim.weight_decay import moved

BETA2, EPSILON = 0.95, 1e-8  # of NorMuon's second moment
MOST_AT_ONCE = 2**23  # elements in a stack of matrices: what it takes besides is six times as much

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
) -> tuple[Arrays, Arrays, Arrays]:
    """One update of matrices [rows, cols]; all dicts are used up, and have the same names, but for `seconds` [rows],
    which is empty without train.normuon. `head_size` is the width of the heads that train.muon_split_heads takes apart.
    Returns the new (params, buffers, seconds).

        m <- mu m + (1 - mu) g;   u = orthogonalise(mu m + (1 - mu) g)         (Nesterov's look ahead)
        s <- b2 s + (1 - b2) mean of a row's u^2;   u <- u / sqrt(s), at u's norm      (NorMuon, Li et al., 2025)
        W <- W - lr (scale u + weight_decay W)                             (optim/weight_decay.py)
    """
    new_params: Arrays = {}
    new_buffers: Arrays = {}
    new_seconds: Arrays = {}
    split = head_size if train.muon_split_heads else None
    for names in _groups(params, split):  # matrices of one shape go through the iteration together
        stack = []
        for name in names:
            ahead, new_buffers[name] = _momentum(grads.pop(name), buffers.pop(name), momentum)
            stack.append(_pieces(name, ahead, split))
        directions = orthogonalise(mx.concatenate(stack))
        each = len(directions) // len(names)
        for i, name in enumerate(names):
            u = _joined(name, directions[i * each : (i + 1) * each], params[name].shape)
            if train.normuon:
                u, new_seconds[name] = _even_rows(u, seconds.pop(name))
            u = u * update_scale(u.shape, train.muon_scale)
            new_params[name] = moved(params.pop(name), u, lr, train)
        del stack, directions, ahead, u
        done = [a[name] for name in names for a in (new_params, new_buffers, new_seconds) if name in a]
        wait(done, done)
    return new_params, new_buffers, new_seconds


def update_scale(shape: tuple[int, ...], kind: str = "adamw") -> float:
    """What an orthogonal update is multiplied by.

    adamw: 0.2 sqrt(max(rows, cols)): its elements then have the size of AdamW's, so that one learning rate and one
    weight decay serve both (Liu et al., "Muon is scalable for LLM training", 2025, equation 4). keller:
    sqrt(max(1, rows / cols)), Muon's own (Jordan et al., 2024), for learning rates about 0.02.
    """
    rows, cols = shape
    return 0.2 * math.sqrt(max(shape)) if kind == "adamw" else math.sqrt(max(1.0, rows / cols))


def _even_rows(u: mx.array, second: mx.array) -> tuple[mx.array, mx.array]:
    """Rows divided by the root of their running mean square, the whole at the norm it had; and the new mean square."""
    second = BETA2 * second + (1 - BETA2) * mx.mean(u * u, axis=1)  # [rows]
    even = u / (mx.sqrt(second) + EPSILON)[:, None]
    return even * (mx.sqrt(mx.sum(u * u)) / (mx.sqrt(mx.sum(even * even)) + EPSILON)), second


def _groups(params: Arrays, head_size: int | None) -> list[list[str]]:
    """Names of matrices that come apart into pieces of one shape, no more than MOST_AT_ONCE together."""
    groups: dict[tuple[tuple[int, ...], str], list[list[str]]] = {}
    for name, w in params.items():
        cut = "" if head_size is None or "self_attn" not in name else "columns" if "o_proj" in name else "rows"
        group = groups.setdefault((w.shape, cut), [[]])
        if group[-1] and (len(group[-1]) + 1) * w.size > MOST_AT_ONCE:
            group.append([])
        group[-1].append(name)
    return [names for group in groups.values() for names in group]


def _momentum(g: mx.array, buffer: mx.array, momentum: mx.array) -> tuple[mx.array, mx.array]:
    """Nesterov's look ahead, and the new buffer."""
    buffer = momentum * buffer + (1 - momentum) * g
    return momentum * buffer + (1 - momentum) * g, buffer


def _pieces(name: str, g: mx.array, head_size: int | None) -> mx.array:
    """[n, rows, cols]: the matrix whole, or each head's part of an attention projection: rows of q, k and v, columns of
    o."""
    if head_size is None or "self_attn" not in name:
        return g[None]
    if "o_proj" in name:
        return g.reshape(g.shape[0], -1, head_size).swapaxes(0, 1)
    return g.reshape(-1, head_size, g.shape[1])


def _joined(name: str, pieces: mx.array, shape: tuple[int, ...]) -> mx.array:
    """Undoes `_pieces`."""
    if "o_proj" in name and len(pieces) > 1:
        return pieces.swapaxes(0, 1).reshape(shape)
    return pieces.reshape(shape)
