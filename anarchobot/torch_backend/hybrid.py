"""One update of all parameters, each by its optimizer (optim/param_groups.py says which)."""

import torch
from torch import Tensor

from anarchobot.config.schema import TrainConfig
from anarchobot.optim.param_groups import adamw_lr_ratio, state_shapes
from anarchobot.torch_backend.adamw import adamw
from anarchobot.torch_backend.muon import muon

Tensors = dict[str, Tensor]
State = dict[str, Tensors]  # by optim/param_groups.py's kinds and the parameters' names


def init_state(params: Tensors, train: TrainConfig) -> State:
    """Zeros for every moment, float32, on the parameters' device."""
    shapes = state_shapes({name: tuple(p.shape) for name, p in params.items()}, train)
    return {
        kind: {name: torch.zeros(shape, device=params[name].device) for name, shape in of.items()}
        for kind, of in shapes.items()
    }


def update(
    params: Tensors,
    grads: Tensors,
    state: State,
    lr: float,
    momentum: float,
    count: int,
    train: TrainConfig,
    head_size: int,
) -> None:
    """One step of Muon and AdamW, in place, all in float32; the state says which parameter is whose. `count` is 1 for
    the first; `head_size` is for Muon."""
    with torch.no_grad():
        muon(params, grads, state["muon.momentum"], state["muon.second"], lr, momentum, train, head_size)
        adamw(params, grads, state["adamw.first"], state["adamw.second"], lr * adamw_lr_ratio(train), count, train)
