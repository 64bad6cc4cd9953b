"""Adapted matrices, adapter shapes and initial values, and which matrices are quantized. Does not import MLX:
checkpoints and file conversion use it."""

import hashlib
import math

import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import LoraConfig, ModelConfig
from anarchobot.model.parameters import parameter_shapes

Shapes = dict[str, tuple[int, ...]]
GROUP = 64  # columns of a quantized matrix that share a scale and a bias: mlx-lm's default


def adapted_matrices(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """Returns the names, without ".weight", of the lora.target_modules in the last lora.num_layers blocks."""
    first = 0 if lora.num_layers is None else max(0, model.n_layers - lora.num_layers)
    names = (name.removesuffix(".weight") for name in parameter_shapes(model) if name.endswith("_proj.weight"))
    return [
        name
        for name in names
        if int(name.split(".")[2]) >= first
        and (lora.target_modules == "auto" or name.rpartition(".")[2] in lora.target_modules)
    ]


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> Shapes:
    """Returns the trained and saved shapes: lora_a [in, r], lora_b [r, out] and, with DoRA, m [out] of each matrix."""
    assert lora.r is not None
    model_shapes = parameter_shapes(model)
    shapes: Shapes = {}
    for name in adapted_matrices(model, lora):
        rows, columns = model_shapes[f"{name}.weight"]
        shapes[f"{name}.lora_a"], shapes[f"{name}.lora_b"] = (columns, lora.r), (lora.r, rows)
        if lora.dora:
            shapes[f"{name}.m"] = (rows,)
    return shapes


def trained_shapes(model: ModelConfig, lora: LoraConfig) -> Shapes:
    """Returns the shapes of the adapters or, without lora.r, of all parameters."""
    return parameter_shapes(model) if lora.r is None else adapter_shapes(model, lora)


def trained_count(model: ModelConfig, lora: LoraConfig) -> int:
    return sum(math.prod(shape) for shape in trained_shapes(model, lora).values())


def is_quantized(shape: tuple[int, ...]) -> bool:
    """Whether lora.quantize applies to a parameter of this shape: as in mlx-lm, only to matrices whose width is a
    multiple of GROUP."""
    return len(shape) == 2 and shape[1] % GROUP == 0


def adapter_scale(lora: LoraConfig) -> float:
    """s in y = x W^T + s (x A) B: alpha / r, or alpha / sqrt(r) (rsLoRA; Kalajdzievski, 2023)."""
    assert lora.r is not None
    return lora.alpha / (math.sqrt(lora.r) if lora.rslora else lora.r)


def init_factors(model: ModelConfig, lora: LoraConfig, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Initial values: lora_a uniform within 1 / sqrt(in), as in mlx-lm and PEFT, and lora_b zero, so that an adapter
    starts without effect. As in model/parameters.py, the values depend only on seed and name. (m starts as the row
    norms of the base weights: model/frozen.py.)"""
    values = {}
    for name, shape in adapter_shapes(model, lora).items():
        if name.endswith(".lora_a"):
            key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "big")
            bound = 1 / math.sqrt(shape[0])
            draws = np.random.Generator(np.random.Philox(key=key)).random(shape, np.float32)
            values[name] = (2 * draws - 1) * np.float32(bound)
        elif name.endswith(".lora_b"):
            values[name] = np.zeros(shape, np.float32)
    return values
