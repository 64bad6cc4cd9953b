"""Muon and AdamW in PyTorch, in place: optim/muon.py and optim/adamw.py, with the same constants and groups."""

import torch
from torch import Tensor

from anarchobot.config.schema import TrainConfig
from anarchobot.optim.param_groups import (
    ADAMW_BETA1,
    ADAMW_BETA2,
    ADAMW_EPS,
    NORM_EPS,
    NORM_MARGIN,
    NORMUON_BETA2,
    NORMUON_EPS,
    POLAR_EXPRESS,
    merge_heads,
    muon_batches,
    muon_scale,
    split_heads,
    state_shapes,
)
from anarchobot.torch_backend.device import reduced_float32

Tensors = dict[str, Tensor]
State = dict[str, Tensors]  # by kind of moment and parameter name


def init_state(params: Tensors, train: TrainConfig) -> State:
    """Zeros for every moment, float32, on the parameters' device."""
    shapes = state_shapes({name: tuple(p.shape) for name, p in params.items()}, train)
    return {
        kind: {name: torch.zeros(shape, device=params[name].device) for name, shape in by_name.items()}
        for kind, by_name in shapes.items()
    }


def adamw(
    params: Tensors, grads: Tensors, first: Tensors, second: Tensors, lr: float, count: int, train: TrainConfig
) -> None:
    """One update of the parameters in `first` and `second`, with bias correction (formula: optim/adamw.py)."""
    correction1, correction2 = 1 - ADAMW_BETA1**count, 1 - ADAMW_BETA2**count
    for name, m in first.items():
        g, v = grads[name], second[name]
        m.mul_(ADAMW_BETA1).add_(g, alpha=1 - ADAMW_BETA1)
        v.mul_(ADAMW_BETA2).addcmul_(g, g, value=1 - ADAMW_BETA2)
        u = (m / correction1).div_((v / correction2).sqrt_().add_(ADAMW_EPS))
        apply_update(params[name], u, lr, train)


def muon(
    params: Tensors,
    grads: Tensors,
    buffers: Tensors,
    second_moments: Tensors,
    lr: float,
    momentum: float,
    train: TrainConfig,
    head_size: int,
) -> None:
    """One update of the matrices in `buffers` (formula: optim/muon.py)."""
    split = head_size if train.muon_split_heads else None
    shapes = {name: tuple(m.shape) for name, m in buffers.items()}
    for names in muon_batches(shapes, train.muon_split_heads):  # [n, rows, cols] each
        for name in names:
            buffers[name].mul_(momentum).add_(grads[name], alpha=1 - momentum)
        lookahead = torch.stack([momentum * buffers[name] + (1 - momentum) * grads[name] for name in names])
        u = merge_heads(names[0], orthogonalize(split_heads(names[0], lookahead, split)), tuple(lookahead.shape))
        if train.normuon:
            u = _normalize_rows(u, [second_moments[name] for name in names])
        u = u * muon_scale(shapes[names[0]], train.muon_scale)
        for name, direction in zip(names, u, strict=True):
            apply_update(params[name], direction, lr, train)


def orthogonalize(g: Tensor) -> Tensor:
    """Polar Express of a stack [n, rows, cols] (optim/polar_express.py)."""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) * NORM_MARGIN + NORM_EPS)
    x = _steps_on_x(x) if reduced_float32(x.device) else _steps_on_small_side(x)
    return x.mT if tall else x


def _steps_on_small_side(x: Tensor) -> Tensor:
    gram = x @ x.mT
    poly: Tensor | None = None
    for i, (a, b, c) in enumerate(POLAR_EXPRESS):
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # M = a + inner
        if poly is None:
            poly = inner + a * torch.eye(gram.shape[-1], device=x.device)
        else:
            poly = torch.baddbmm(poly, poly, inner, beta=a)
        if i + 1 < len(POLAR_EXPRESS):
            half = torch.baddbmm(gram, gram, inner, beta=a)  # A M
            gram = torch.baddbmm(half, half, inner, beta=a)  # M A M: all of these commute
    assert poly is not None
    return torch.bmm(poly, x)


def _steps_on_x(x: Tensor) -> Tensor:
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def apply_update(w: Tensor, u: Tensor, lr: float, train: TrainConfig) -> None:
    """W <- W - lr (u + weight_decay W), consuming `u` (optim/adamw.py)."""
    if train.weight_decay != 0 and w.ndim > 1:
        decayed = w * (u * w > 0) if train.cautious_weight_decay else w
        u.add_(decayed, alpha=train.weight_decay)
    w.sub_(u, alpha=lr)


def _normalize_rows(u: Tensor, second_moments: list[Tensor]) -> Tensor:
    """Divides the rows of u [n, rows, cols] by the root of their running mean square, a [rows] of `second_moments` for
    each matrix, which is updated; rescales each matrix to its previous norm."""
    squares = u.square().sum(dim=2)  # [n, rows]
    for second, row_squares in zip(second_moments, squares, strict=True):
        second.mul_(NORMUON_BETA2).add_(row_squares, alpha=(1 - NORMUON_BETA2) / u.shape[2])
    scale = 1 / (torch.stack(second_moments).sqrt() + NORMUON_EPS)
    before, after = (x.sum(dim=1, keepdim=True).sqrt() for x in (squares, squares * scale * scale))
    return u * (scale * before / (after + NORMUON_EPS))[..., None]
