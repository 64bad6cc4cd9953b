"""Assigns parameters to optimizers; constants and state of the optimizers. Imports no array library: both backends read
this file, so that a checkpoint of one is a checkpoint of the other."""

import math
from collections.abc import Container, Mapping
from itertools import pairwise
from typing import Any, Literal

import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import TrainConfig

ADAMW_BETA1, ADAMW_BETA2, ADAMW_EPS = 0.9, 0.95, 1e-8
NORMUON_BETA2, NORMUON_EPS = 0.95, 1e-8
# Polar Express (Amsel et al., 2025): five (a, b, c) of X <- a X + b (X X^T) X + c (X X^T)^2 X, for singular values from
# 1e-3 up. The input is divided by its Frobenius norm times NORM_MARGIN, plus NORM_EPS.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NORM_MARGIN, NORM_EPS = 1.02, 1e-6
STRIPS, MIN_SIZE_FOR_STRIPS = 4, 512  # on a CPU, symmetric products of this size or more are computed in strips
MAX_BATCH_ELEMENTS = 2**21  # in a batch of matrices for Muon; its temporaries are many times larger
RAW_PARAMS = "optimizer/trained/"  # checkpoint prefix of the trained weights when params/ holds their running average
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Shape = tuple[int, ...]


def optimizer_of(name: str, ndim: int, optimizer: Literal["muon_adamw", "adamw"]) -> Literal["muon", "adamw"]:
    """Muon takes the matrices inside the blocks. Embeddings and the head are matrices too, but belong to AdamW: their
    rows are tokens, not directions. So do adapters: Muon equalizes the update of a whole matrix, not of the two factors
    of a change to it."""
    in_block = ".layers." in name and name.endswith(".weight") and ndim == 2
    return "muon" if optimizer == "muon_adamw" and in_block else "adamw"


def is_decayed(name: str, ndim: int) -> bool:
    """Whether weight decay applies: not to norms and other vectors, nor to biases (those of stacked experts are
    matrices) and the state matrix of Mamba."""
    return ndim > 1 and not name.endswith(("bias", ".A_log"))


def select_trainable(shapes: Mapping[str, Shape], trainable: Literal["all", "embeddings"]) -> list[str]:
    """Returns the parameter names that train.trainable selects. Embeddings and the head are the matrices outside the
    blocks, which have numbers in their names."""
    return [
        name
        for name, shape in shapes.items()
        if trainable == "all" or (len(shape) == 2 and not any(part.isdigit() for part in name.split(".")))
    ]


def describe_groups(shapes: Mapping[str, Shape], optimizer: Literal["muon_adamw", "adamw"]) -> list[str]:
    """Returns one line per optimizer with its parameters, merged over the blocks."""
    kinds: dict[str, dict[str, int]] = {"muon": {}, "adamw": {}}
    for name, shape in shapes.items():
        short = name.removeprefix("model.").removesuffix(".weight").rpartition(".")[2]
        kind = kinds[optimizer_of(name, len(shape), optimizer)]
        kind[short] = kind.get(short, 0) + math.prod(shape)
    return [
        f"{title}: {', '.join(kinds[kind])} ({sum(kinds[kind].values()):,} parameters)"
        for kind, title in (("muon", "Muon"), ("adamw", "AdamW"))
        if kinds[kind]
    ]


def state_shapes(shapes: Mapping[str, Shape], train: TrainConfig) -> dict[str, dict[str, Shape]]:
    """The optimizer state: for each kind of moment, its shape by parameter name (all float32, zero at the start).
    NorMuon's second moment has one number per matrix row."""
    state: dict[str, dict[str, Shape]] = {"muon.momentum": {}, "muon.second": {}, "adamw.first": {}, "adamw.second": {}}
    for name in select_trainable(shapes, train.trainable):
        shape = shapes[name]
        if optimizer_of(name, len(shape), train.optimizer) == "muon":
            state["muon.momentum"][name] = shape
            if train.normuon:
                state["muon.second"][name] = shape[:1]
        else:
            state["adamw.first"][name] = state["adamw.second"][name] = shape
    return state


def check_state(state: Mapping[str, npt.NDArray[Any]], shapes: Mapping[str, Shape], train: TrainConfig) -> None:
    """Raises UserError if an engine's `state` does not match parameters of these `shapes` under `train`."""
    expected: dict[str, Shape] = {f"params/{name}": shape for name, shape in shapes.items()}
    for kind, by_name in state_shapes(shapes, train).items():
        expected |= {f"optimizer/{kind}/{name}": shape for name, shape in by_name.items()}
    names = (name for name in state if name.startswith(("params/", "optimizer/")) and not name.startswith(RAW_PARAMS))
    actual = {name: state[name].shape for name in names}
    for name in [*expected, *actual]:
        if actual.get(name) != expected.get(name):
            saved, needed = (str(list(x[name])) if name in x else "missing" for x in (actual, expected))
            raise UserError(
                f"checkpoint: {name}: the checkpoint has {saved}, this run needs {needed}: the optimizer or the "
                "adapters differ; set train.optimizer, train.normuon and lora as in the original run"
            )


def balanced_shares(shapes: Mapping[str, Shape], by_muon: Container[str], count: int) -> list[list[str]]:
    """Splits the parameter names into `count` shares whose updates take about the same time."""

    def cost(name: str) -> float:
        """Approximate multiplications of an update."""
        return math.prod(shapes[name]) * (10 + 20 * min(shapes[name]) if name in by_muon else 10)

    loads = [0.0] * count
    names: list[list[str]] = [[] for _ in range(count)]
    for name in sorted(shapes, key=lambda name: -cost(name)):
        i = loads.index(min(loads))
        names[i].append(name)
        loads[i] += cost(name)
    return names


def muon_batches(shapes: Mapping[str, Shape], split_heads: bool) -> list[list[str]]:
    """Groups the names of matrices of the same shape, which Muon orthogonalizes in one batch: at most
    MAX_BATCH_ELEMENTS, but at least one matrix. With `split_heads`, attention projections, which are split per head,
    get batches of their own."""
    groups: dict[tuple[Shape, str], list[list[str]]] = {}
    for name, shape in shapes.items():
        split_axis = "" if not split_heads or "self_attn" not in name else "columns" if "o_proj" in name else "rows"
        group = groups.setdefault((shape, split_axis), [[]])
        if group[-1] and (len(group[-1]) + 1) * math.prod(shape) > MAX_BATCH_ELEMENTS:
            group.append([])
        group[-1].append(name)
    return [names for group in groups.values() for names in group]


def split_heads(name: str, stack: Any, head_size: int | None) -> Any:
    """[n, rows, cols] -> [m, ...]: with a `head_size`, each head's part of an attention projection (rows of q, k and v,
    columns of o); otherwise the matrices as they are. `stack` is an MLX array or a torch tensor."""
    if head_size is None or "self_attn" not in name:
        return stack
    n, rows, cols = stack.shape
    if "o_proj" in name:
        return stack.reshape(n, rows, -1, head_size).swapaxes(1, 2).reshape(-1, rows, head_size)
    return stack.reshape(-1, head_size, cols)


def merge_heads(name: str, parts: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `split_heads`: [m, ...] -> `shape`."""
    n, rows, cols = shape
    if "o_proj" in name and parts.shape[2] < cols:
        return parts.reshape(n, -1, rows, parts.shape[2]).swapaxes(1, 2).reshape(shape)
    return parts.reshape(shape)


def muon_scale(shape: tuple[int, ...], kind: Literal["adamw", "keller"] = "adamw") -> float:
    """Returns the factor that scales the orthogonalized update of a matrix [rows, cols].

    adamw: 0.2 sqrt(max(rows, cols)) gives its elements the size of AdamW's, so that one learning rate and one weight
    decay serve both (Liu et al., "Muon is scalable for LLM training", 2025, equation 4). keller: sqrt(max(1, rows /
    cols)), Muon's own (Jordan et al., 2024), for learning rates of about 0.02.
    """
    rows, cols = shape
    return 0.2 * math.sqrt(max(shape)) if kind == "adamw" else math.sqrt(max(1.0, rows / cols))


def adamw_lr_ratio(train: TrainConfig) -> float:
    """Returns AdamW's learning rate divided by the scheduled one, which is Muon's: 1 unless train.adamw_lr is set."""
    if train.optimizer == "adamw" or train.adamw_lr is None:
        return 1.0
    return train.adamw_lr / train.lr


def muon_flops(
    shapes: Mapping[str, Shape], train: TrainConfig, head_size: int, *, on_cpu: bool, reduced_float32: bool
) -> int:
    """FLOPs of Muon's matrix products in one update. For each matrix, or each head's part of an attention projection
    with train.muon_split_heads, of small side s and large side k (optim/polar_express.py): X X^T, 17 products of [s, s]
    and the last one with X, 4 s^2 k + 34 s^3; of symmetric products in strips, only what is computed. With
    `reduced_float32`, five steps on X, 20 s^2 k + 10 s^3."""
    total = 0
    for name, (*sides,) in shapes.items():
        if optimizer_of(name, len(sides), train.optimizer) != "muon":
            continue
        parts = 1
        if train.muon_split_heads and "self_attn" in name:
            axis = 1 if "o_proj" in name else 0
            parts, sides[axis] = sides[axis] // head_size, head_size
        s, k = sorted(sides)
        if reduced_float32:
            total += parts * len(POLAR_EXPRESS) * (4 * s * s * k + 2 * s**3)
            continue
        strips = STRIPS if on_cpu and s >= MIN_SIZE_FOR_STRIPS else 1
        pairs = sum((end - start) * end for start, end in pairwise(s * i // strips for i in range(strips + 1)))
        total += parts * (2 * pairs * (k + 17 * s) + 2 * s * s * k)
    return total
