"""Which parameter goes to which optimizer, and one update of them all."""

import math
from typing import Literal

import mlx.core as mx

from anarchobot.config.schema import TrainConfig
from anarchobot.numerics.order import Wait, tied
from anarchobot.optim.adamw import adamw
from anarchobot.optim.muon import muon

Arrays = dict[str, mx.array]
State = dict[str, Arrays]  # "muon.momentum", "muon.second", "adamw.first", "adamw.second": arrays by parameter name


def route(name: str, ndim: int, optimizer: Literal["muon_adamw", "adamw"]) -> Literal["muon", "adamw"]:
    """Muon takes the matrices inside the blocks. Being a matrix is not enough: embeddings and the head are AdamW's."""
    in_block = ".layers." in name and ndim == 2
    return "muon" if optimizer == "muon_adamw" and in_block else "adamw"


def describe_routes(shapes: dict[str, tuple[int, ...]], optimizer: Literal["muon_adamw", "adamw"]) -> list[str]:
    """One line for each optimizer: which parameters it has, blocks taken together. `shapes` by name."""
    kinds: dict[str, dict[str, int]] = {"muon": {}, "adamw": {}}
    for name, shape in shapes.items():
        short = name.removeprefix("model.").removesuffix(".weight").rpartition(".")[2]
        kind = kinds[route(name, len(shape), optimizer)]
        kind[short] = kind.get(short, 0) + math.prod(shape)
    return [
        f"{title}: {', '.join(kinds[kind])} ({sum(kinds[kind].values()):,} parameters)"
        for kind, title in (("muon", "Muon"), ("adamw", "AdamW"))
        if kinds[kind]
    ]


def init_state(params: Arrays, train: TrainConfig) -> State:
    """Zeros for every moment, float32."""
    state: State = {"muon.momentum": {}, "muon.second": {}, "adamw.first": {}, "adamw.second": {}}
    for name, p in params.items():
        if route(name, p.ndim, train.optimizer) == "muon":
            state["muon.momentum"][name] = mx.zeros(p.shape)
            if train.normuon:
                state["muon.second"][name] = mx.zeros(p.shape[:1])
        else:
            state["adamw.first"][name] = mx.zeros(p.shape)
            state["adamw.second"][name] = mx.zeros(p.shape)
    return state


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
) -> tuple[Arrays, State]:
    """One step of Muon and AdamW; `lr`, `momentum` and `count` are float32 scalars (as Python numbers they would be
    compiled in and never change). The state says which parameter is whose; `head_size` is for Muon. All dicts are used
    up, so that what is new can take the memory of what was. Returns the new (params, state)."""
    names = list(params)
    matrices = {name: params.pop(name) for name in state["muon.momentum"]}
    matrices, buffers, seconds = muon(
        matrices, grads, state["muon.momentum"], state["muon.second"], lr, momentum, train, head_size, wait
    )
    if train.optimizer == "muon_adamw" and train.adamw_lr is not None:
        lr = lr * (train.adamw_lr / train.lr)
    rest, first, second = adamw(params, grads, state["adamw.first"], state["adamw.second"], lr, count, train, wait)
    new = matrices | rest
    return (
        {name: new[name] for name in names},
        {"muon.momentum": buffers, "muon.second": seconds, "adamw.first": first, "adamw.second": second},
    )


def shares(params: Arrays, state: State, count: int) -> list[list[str]]:
    """The parameters' names in `count` shares that take about as long to update, each with its part of Muon's."""
    loads = [0.0] * count
    names: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(params, key=lambda name: -_work(params[name], name in state["muon.momentum"])):
        i = loads.index(min(loads))
        names[i].append(name)
        loads[i] += _work(params[name], name in state["muon.momentum"])
    return names


def _work(p: mx.array, by_muon: bool) -> float:
    """Roughly the multiplications of an update."""
    return p.size * (10 + 20 * min(p.shape) if by_muon else 10)
