"""Which parameter goes to which optimizer, at what rate, and what is remembered of it. No array library here: both
engines read this, so that a checkpoint of one is a checkpoint of the other."""

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal

import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import TrainConfig

TRAINED = "optimizer/trained/"  # in a checkpoint: the parameters behind a running average
MOST_AT_ONCE = 2**21  # elements in a stack of matrices: what it takes besides is many times as much
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
Shape = tuple[int, ...]


def route(name: str, ndim: int, optimizer: Literal["muon_adamw", "adamw"]) -> Literal["muon", "adamw"]:
    """Muon takes the matrices inside the blocks. Being a matrix is not enough: embeddings and the head are AdamW's, and
    so are adapters: what Muon makes even is the update of a whole matrix, not of the two factors of a change to it."""
    in_block = ".layers." in name and name.endswith(".weight") and ndim == 2
    return "muon" if optimizer == "muon_adamw" and in_block else "adamw"


def trained(names: Iterable[str], trainable: Literal["all", "embeddings"]) -> list[str]:
    """Those of a model's parameters that train.trainable trains."""
    return [name for name in names if trainable == "all" or name in EMBEDDINGS]


def describe_routes(shapes: Mapping[str, Shape], optimizer: Literal["muon_adamw", "adamw"]) -> list[str]:
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


def state_shapes(shapes: Mapping[str, Shape], train: TrainConfig) -> dict[str, dict[str, Shape]]:
    """The optimizers' state: by kind and parameter name, the shape of each moment (all float32, zero at the start).
    NorMuon's second moment has one number for each row of a matrix."""
    state: dict[str, dict[str, Shape]] = {"muon.momentum": {}, "muon.second": {}, "adamw.first": {}, "adamw.second": {}}
    for name in trained(shapes, train.trainable):
        shape = shapes[name]
        if route(name, len(shape), train.optimizer) == "muon":
            state["muon.momentum"][name] = shape
            if train.normuon:
                state["muon.second"][name] = shape[:1]
        else:
            state["adamw.first"][name] = state["adamw.second"][name] = shape
    return state


def update_shares(shapes: Mapping[str, Shape], by_muon: Container[str], count: int) -> list[list[str]]:
    """The parameters' names in `count` shares that take about as long to update, each with its part of Muon's."""

    def work(name: str) -> float:
        """Roughly the multiplications of an update."""
        return math.prod(shapes[name]) * (10 + 20 * min(shapes[name]) if name in by_muon else 10)

    loads = [0.0] * count
    names: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(shapes, key=lambda name: -work(name)):
        i = loads.index(min(loads))
        names[i].append(name)
        loads[i] += work(name)
    return names


def muon_stacks(shapes: Mapping[str, Shape], split_heads: bool, most: int = MOST_AT_ONCE) -> list[list[str]]:
    """Names of matrices that come apart into pieces of one shape, which Muon takes together: no more than `most`
    elements, but at least one matrix."""
    groups: dict[tuple[Shape, str], list[list[str]]] = {}
    for name, shape in shapes.items():
        cut = "" if not split_heads or "self_attn" not in name else "columns" if "o_proj" in name else "rows"
        group = groups.setdefault((shape, cut), [[]])
        if group[-1] and (len(group[-1]) + 1) * math.prod(shape) > most:
            group.append([])
        group[-1].append(name)
    return [names for group in groups.values() for names in group]


def check_state(state: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, Shape], train: TrainConfig) -> None:
    """Raises UserError when an engine's `state` is not of parameters of these `shapes`, trained as `train` says."""
    own = {f"params/{name}": shape for name, shape in shapes.items()}
    for kind, by_name in state_shapes(shapes, train).items():
        own |= {f"optimizer/{kind}/{name}": shape for name, shape in by_name.items()}
    kept = (name for name in state if name.startswith(("params/", "optimizer/")) and not name.startswith(TRAINED))
    found = {name: state[name].shape for name in kept}
    for name in [*own, *found]:
        if found.get(name) != own.get(name):
            there, here = (f"{list(of[name])}" if name in of else "missing" for of in (found, own))
            raise UserError(
                f"checkpoint: {name} is {there}, and would be {here} in this run: another optimizer, or other "
                "adapters: set train.optimizer, train.normuon and lora as they were"
            )


def adamw_lr_ratio(train: TrainConfig) -> float:
    """AdamW's learning rate as a multiple of the schedule's, which is Muon's: with train.adamw_lr it has its own."""
    if train.optimizer == "adamw" or train.adamw_lr is None:
        return 1.0
    return train.adamw_lr / train.lr
