"""Parameter names, shapes, counts and initial values of any architecture. Does not import MLX."""

import hashlib
import math
from collections.abc import Collection, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import ModelConfig
from anarchobot.model.architecture import QueryBlocks, Shape, architecture

T = TypeVar("T")


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Names and shapes, matrices as (out, in), in the order of the forward pass."""
    return architecture(model.architecture).parameter_shapes(model)


def parameter_count(model: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())


def init_parameters(model: ModelConfig, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Initial values: norms one, biases zero, matrices normal with the architecture's standard deviation.

    Each matrix has its own generator, keyed by seed and name: the values do not depend on the backend or on which other
    parameters exist.
    """
    init = architecture(model.architecture).init
    values: dict[str, npt.NDArray[np.float32]] = {}
    for name, shape in parameter_shapes(model).items():
        mean, std = init(name, model)
        if len(shape) == 1:
            values[name] = np.full(shape, mean, np.float32)
        else:
            key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "big")
            generator = np.random.Generator(np.random.Philox(key=key))
            values[name] = generator.standard_normal(shape, np.float32) * np.float32(std)
    return values


def model_flops(model: ModelConfig, rows: int, blocks: QueryBlocks) -> int:
    """Returns the FLOPs of the loss and gradients of `rows` sequences, without recomputation."""
    arch = architecture(model.architecture)
    parts = arch.step_flops(model, rows, blocks)
    return (
        sum(parts.values()) - parts.get("blocks forward again", 0) - arch.recomputed_flops(model, rows, blocks, False)
    )


def by_block(params: Mapping[str, T], model: ModelConfig) -> list[dict[str, T]]:
    """Returns the parameters of each block, by their names inside the block: "self_attn.q_proj.weight"."""
    blocks: list[dict[str, T]] = [{} for _ in range(model.n_layers)]
    for name, p in params.items():
        if name.startswith("model.layers."):
            number, _, inner = name.removeprefix("model.layers.").partition(".")
            blocks[int(number)][inner] = p
    return blocks


def lowest_trained_block(trained: Collection[str], model: ModelConfig) -> int:
    """Returns the first block that the backward pass must reach; n_layers if there is none."""
    blocks = [int(name.split(".")[2]) for name in trained if name.startswith("model.layers.")]
    below = any(not name.startswith(("model.layers.", "model.norm.", "lm_head.")) for name in trained)
    return 0 if below else min(blocks, default=model.n_layers)
