"""Muon (Jordan et al., 2024): momentum, orthogonalized. optim/muon.py in place; for the blocks' matrices only."""

import math

import torch
from torch import Tensor

from anarchobot.config.schema import TrainConfig
from anarchobot.torch_backend.orthogonal import orthogonalize
from anarchobot.torch_backend.weight_decay import move

BETA2, EPSILON = 0.95, 1e-8  # of NorMuon's second moment
MOST_AT_ONCE = 2**23  # elements in a stack of matrices: what it takes besides is six times as much

Tensors = dict[str, Tensor]


def muon(
    params: Tensors,
    grads: Tensors,
    buffers: Tensors,
    seconds: Tensors,
    lr: float,
    momentum: float,
    train: TrainConfig,
    head_size: int,
) -> None:
    """One update of matrices [rows, cols], in place; `buffers` say which of the others are Muon's. `seconds` [rows] is
    empty without train.normuon. `head_size` is the width of the heads that train.muon_split_heads takes apart.

        m <- mu m + (1 - mu) g;   u = orthogonalize(mu m + (1 - mu) g)         (Nesterov's look ahead)
        s <- b2 s + (1 - b2) mean of a row's u^2;   u <- u / sqrt(s), at u's norm      (NorMuon, Li et al., 2025)
        W <- W - lr (scale u + weight_decay W)
    """
    split = head_size if train.muon_split_heads else None
    for names in _groups(buffers, split):  # matrices of one shape go through all of it together: [n, rows, cols]
        for name in names:
            buffers[name].mul_(momentum).add_(grads[name], alpha=1 - momentum)
        ahead = torch.stack([momentum * buffers[name] + (1 - momentum) * grads[name] for name in names])
        u = _joined(names[0], orthogonalize(_pieces(names[0], ahead, split)), ahead.shape)
        if train.normuon:
            u = _even_rows(u, [seconds[name] for name in names])
        u = u * update_scale(ahead.shape[1:], train.muon_scale)
        for name, own in zip(names, u, strict=True):
            move(params[name], own, lr, train)


def update_scale(shape: tuple[int, ...], kind: str = "adamw") -> float:
    """What an orthogonal update is multiplied by: 0.2 sqrt(max(rows, cols)), which gives it AdamW's size, or Muon's own
    sqrt(max(1, rows / cols)) (optim/muon.py)."""
    rows, cols = shape
    return 0.2 * math.sqrt(max(shape)) if kind == "adamw" else math.sqrt(max(1.0, rows / cols))


def _even_rows(u: Tensor, seconds: list[Tensor]) -> Tensor:
    """[n, rows, cols]: rows divided by the root of their running mean square, each matrix at the norm that it had; the
    mean squares, a [rows] for each matrix, are brought up to date."""
    squares = u.square().sum(dim=2)  # [n, rows]
    for second, own in zip(seconds, squares, strict=True):
        second.mul_(BETA2).add_(own, alpha=(1 - BETA2) / u.shape[2])
    scale = 1 / (torch.stack(seconds).sqrt() + EPSILON)
    before, after = (x.sum(dim=1, keepdim=True).sqrt() for x in (squares, squares * scale * scale))
    return u * (scale * before / (after + EPSILON))[..., None]


def _groups(matrices: Tensors, head_size: int | None) -> list[list[str]]:
    """Names of matrices that come apart into pieces of one shape, no more than MOST_AT_ONCE together."""
    groups: dict[tuple[tuple[int, ...], str], list[list[str]]] = {}
    for name, w in matrices.items():
        cut = "" if head_size is None or "self_attn" not in name else "columns" if "o_proj" in name else "rows"
        group = groups.setdefault((tuple(w.shape), cut), [[]])
        if group[-1] and (len(group[-1]) + 1) * w.numel() > MOST_AT_ONCE:
            group.append([])
        group[-1].append(name)
    return [names for group in groups.values() for names in group]


def _pieces(name: str, g: Tensor, head_size: int | None) -> Tensor:
    """[n, rows, cols] -> [m, ...]: whole matrices, or each head's part of attention projections: rows of q, k and v,
    columns of o."""
    if head_size is None or "self_attn" not in name:
        return g
    n, rows, cols = g.shape
    if "o_proj" in name:
        return g.reshape(n, rows, -1, head_size).transpose(1, 2).reshape(-1, rows, head_size)
    return g.reshape(-1, head_size, cols)


def _joined(name: str, pieces: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undoes `_pieces`."""
    n, rows, cols = shape
    if "o_proj" in name and pieces.shape[2] < cols:
        return pieces.reshape(n, -1, rows, pieces.shape[2]).transpose(1, 2).reshape(shape)
    return pieces.reshape(shape)
