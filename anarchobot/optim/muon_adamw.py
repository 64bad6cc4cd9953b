"""One update of all parameters, each by its optimizer (optim/param_groups.py says which)."""

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.sequencing import Wait, tied
from anarchobot.optim.adamw import adamw
from anarchobot.optim.muon import muon
from anarchobot.optim.param_groups import adamw_lr_ratio, state_shapes, update_shares

Arrays = dict[str, mx.array]
State = dict[str, Arrays]  # "muon.momentum", "muon.second", "adamw.first", "adamw.second": arrays by parameter name


def init_state(params: Arrays, train: TrainConfig) -> State:
    """Zeros for every moment, float32."""
    shapes = state_shapes({name: p.shape for name, p in params.items()}, train)
    return {kind: {name: mx.zeros(shape) for name, shape in of.items()} for kind, of in shapes.items()}


def update(
    params: Arrays,
    grads: Arrays,
    state: State,
    lr: mx.array,
    momentum: mx.array,
    count: mx.array,
    train: TrainConfig,
    head_size: int,
    wait: Wait = tied,
    directions: Arrays | None = None,
) -> tuple[Arrays, State]:
    """One step of Muon and AdamW; `lr`, `momentum` and `count` are float32 scalars (as Python numbers they would be
    compiled in and never change). The state says which parameter is whose; `head_size` is for Muon, and so are
    `directions`, if they are made already. All dicts are used up, so that what is new can take the memory of what was.
    Returns the new (params, state)."""
    names = list(params)
    matrices = {name: params.pop(name) for name in state["muon.momentum"]}
    matrices, buffers, seconds = muon(
        matrices, grads, state["muon.momentum"], state["muon.second"], lr, momentum, train, head_size, wait, directions
    )
    lr = lr * adamw_lr_ratio(train)
    rest, first, second = adamw(params, grads, state["adamw.first"], state["adamw.second"], lr, count, train, wait)
    new = matrices | rest
    return (
        {name: new[name] for name in names},
        {"muon.momentum": buffers, "muon.second": seconds, "adamw.first": first, "adamw.second": second},
    )


def shares(params: Arrays, state: State, count: int) -> list[list[str]]:
    """The parameters' names in `count` shares that take about as long to update, each with its part of Muon's."""
    return update_shares({name: p.shape for name, p in params.items()}, state["muon.momentum"], count)
