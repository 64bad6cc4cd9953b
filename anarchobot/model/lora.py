"""Adapted matrices, adapter shapes and initial values, and which matrices are quantized. Does not import MLX:
checkpoints and file conversion use it."""

import hashlib
import math

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import LoraConfig, ModelConfig
from anarchobot.model.architecture import architecture
from anarchobot.model.parameters import parameter_shapes

Shapes = dict[str, tuple[int, ...]]
GROUP = 64  # columns of a quantized matrix that share a scale and a bias: mlx-lm's default


def adapted_matrices(model: ModelConfig, lora: LoraConfig) -> list[str]:
    """Returns the names, without ".weight", of the lora.target_modules in the last lora.num_layers blocks."""
    first = 0 if lora.num_layers is None else max(0, model.n_layers - lora.num_layers)
    matrices = architecture(model.architecture).adaptable_matrices(model)
    names = {name: name.rpartition(".")[2] for name, matrix in matrices.items() if matrix.block >= first}
    if lora.target_modules != "auto":
        existing = dict.fromkeys(names.values())
        for target in lora.target_modules:
            if target not in existing:
                where = "the model" if first == 0 else f"the last {lora.num_layers} blocks"
                raise UserError(
                    f"lora.target_modules: {where} has no matrix '{target}': expected {', '.join(existing) or 'none'}"
                )
        names = {name: last for name, last in names.items() if last in lora.target_modules}
    if lora.dora:
        for name in names:
            if len(matrices[name].shape) == 3:
                raise UserError(
                    f"lora.dora: {name} is a stack of experts, which only LoRA supports: set lora.dora: false, or "
                    "lora.target_modules to other matrices"
                )
    return list(names)


def factor_shapes(shape: tuple[int, ...], r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of lora_a and lora_b for a matrix (out, in): [in, r] and [r, out]; for E stacked experts (E, out, in):
    [E, r, in] and [E, out, r], as in mlx-lm."""
    *experts, rows, columns = shape
    return ((*experts, r, columns), (*experts, rows, r)) if experts else ((columns, r), (r, rows))


def adapter_shapes(model: ModelConfig, lora: LoraConfig) -> Shapes:
    """Returns the trained and saved shapes: lora_a and lora_b (`factor_shapes`) and, with DoRA, m [out] of each
    matrix."""
    assert lora.r is not None
    matrices = architecture(model.architecture).adaptable_matrices(model)
    shapes: Shapes = {}
    for name in adapted_matrices(model, lora):
        shape = matrices[name].shape
        shapes[f"{name}.lora_a"], shapes[f"{name}.lora_b"] = factor_shapes(shape, lora.r)
        if lora.dora:
            shapes[f"{name}.m"] = shape[:1]
    return shapes


def trained_shapes(model: ModelConfig, lora: LoraConfig) -> Shapes:
    """Returns the shapes of the adapters or, without lora.r, of all parameters."""
    return parameter_shapes(model) if lora.r is None else adapter_shapes(model, lora)


def trained_count(model: ModelConfig, lora: LoraConfig) -> int:
    return sum(math.prod(shape) for shape in trained_shapes(model, lora).values())


def is_quantized(shape: tuple[int, ...]) -> bool:
    """Whether lora.quantize applies to a parameter of this shape: as in mlx-lm, only to matrices whose width is a
    multiple of GROUP."""
    return len(shape) >= 2 and shape[-1] % GROUP == 0


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
            bound = 1 / math.sqrt(shape[0] if len(shape) == 2 else shape[2])  # the width of the input
            draws = np.random.Generator(np.random.Philox(key=key)).random(shape, np.float32)
            values[name] = (2 * draws - 1) * np.float32(bound)
        elif name.endswith(".lora_b"):
            values[name] = np.zeros(shape, np.float32)
    return values
