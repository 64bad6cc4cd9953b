"""Which parameter goes to which optimizer, and one update of them all."""

from typing import Literal

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.optim.adamw import adamw
from anarchobot.optim.muon import muon

Arrays = dict[str, mx.array]
State = dict[str, Arrays]  # "muon.momentum", "adamw.first", "adamw.second": arrays by parameter name


def route(name: str, ndim: int, optimizer: Literal["muon_adamw", "adamw"]) -> Literal["muon", "adamw"]:
    """Muon takes the matrices inside the blocks. Being a matrix is not enough: embeddings and the head are AdamW's."""
    in_block = ".layers." in name and ndim == 2
    return "muon" if optimizer == "muon_adamw" and in_block else "adamw"


def init_state(params: Arrays, train: TrainConfig) -> State:
    """Zeros for every moment, float32."""
    state: State = {"muon.momentum": {}, "adamw.first": {}, "adamw.second": {}}
    for name, p in params.items():
        if route(name, p.ndim, train.optimizer) == "muon":
            state["muon.momentum"][name] = mx.zeros(p.shape)
        else:
            state["adamw.first"][name] = mx.zeros(p.shape)
            state["adamw.second"][name] = mx.zeros(p.shape)
    return state


def update(
    params: Arrays, grads: Arrays, state: State, lr: mx.array, momentum: mx.array, count: mx.array, weight_decay: float
) -> tuple[Arrays, State]:
    """One step of Muon and AdamW; `lr`, `momentum` and `count` are float32 scalars (as Python numbers they would be
    compiled in and never change). The state says which parameter is whose. Returns the new (params, state)."""
    matrices = {name: params[name] for name in state["muon.momentum"]}
    rest = {name: params[name] for name in state["adamw.first"]}
    matrices, buffers = muon(matrices, grads, state["muon.momentum"], lr, momentum, weight_decay)
    rest, first, second = adamw(rest, grads, state["adamw.first"], state["adamw.second"], lr, count, weight_decay)
    new = matrices | rest
    return (
        {name: new[name] for name in params},
        {"muon.momentum": buffers, "adamw.first": first, "adamw.second": second},
    )
