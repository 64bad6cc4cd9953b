"""Frozen weights in as little memory as possible: quantized, or in the dtype of the matrix products."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import LoraConfig, ModelConfig
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.linear import Quantized, matrix
from anarchobot.model.lora import GROUP, adapted_matrices, adapter_scale, init_factors, is_quantized
from anarchobot.model.mlx_lm import frozen as mlx_lm_frozen
from anarchobot.model.parameters import parameter_shapes
from anarchobot.model.quantization import parts_of


def init_adapters(
    weights: Mapping[str, npt.NDArray[Any]], model: ModelConfig, lora: LoraConfig, seed: int, dtype: mx.Dtype
) -> tuple[Params, Params]:
    """Returns new adapters, float32, and the frozen parameters: the base weights and the adapters' constants."""
    frozen = frozen_weights(weights, model, dtype, lora.quantize)
    scales = dict.fromkeys(adapted_matrices(model, lora), adapter_scale(lora))
    frozen |= adapter_constants(frozen, model, scales, lora.dora)
    adapters = {name: mx.array(value) for name, value in init_factors(model, lora, seed).items()}
    if lora.dora:
        adapters |= {
            f"{name}.m": mx.array(frozen[f"{name}.row_norms"]) for name in adapted_matrices(model, lora)
        }  # unchanged row norms
    return adapters, frozen


def frozen_weights(
    weights: Mapping[str, npt.NDArray[Any]], model: ModelConfig, dtype: mx.Dtype, bits: int | None = None
) -> Params:
    """Converts float32 weights, reading them one at a time: norms stay float32; matrices become `dtype` or, with `bits`
    (4 or 8), are quantized with scales in `dtype`, including embedding and head (lora.is_quantized). Matrices that are
    quantized already (model/quantization.py) stay as they are, with scales in `dtype`."""
    if model.architecture == "mlx_lm":
        return mlx_lm_frozen.frozen_weights(weights, model, dtype, bits)
    frozen: Params = {}
    names = set(weights)
    for name, shape in parameter_shapes(model).items():
        weight = mx.array(weights[name])
        if (parts := parts_of(name))[1] in names:
            frozen[name] = weight
            frozen |= {part: mx.array(weights[part]).astype(dtype) for part in parts[1:]}
        elif len(shape) == 1:
            frozen[name] = weight
        elif bits is None or not is_quantized(shape):
            frozen[name] = weight.astype(dtype)
        else:
            packed, scales, biases = mx.quantize(weight, group_size=GROUP, bits=bits)
            packed = packed.reshape(shape[0], -1, bits)
            frozen |= dict(zip(parts, (packed, scales.astype(dtype), biases.astype(dtype)), strict=True))
        mx.eval(frozen)  # frees the float32 weight before the next one is read
    return frozen


def inference_weights(weights: Mapping[str, npt.NDArray[Any]], model: ModelConfig, dtype: mx.Dtype) -> Params:
    """Converts float32 weights to `dtype`, reading them one at a time; quantized matrices stay quantized."""
    if model.architecture == "mlx_lm":
        return mlx_lm_frozen.frozen_weights(weights, model, dtype)
    params: Params = {}
    for name, array in weights.items():
        params[name] = mx.array(array) if array.dtype == np.uint32 else mx.array(array).astype(dtype)
        mx.eval(params[name])  # frees the float32 weight before the next one is read
    return params


def compute_dtype(params: Params) -> mx.Dtype:
    """The dtype in which loaded weights compute: that of the last norm or, under other names, of the first array."""
    if "model.norm.weight" in params:
        return params["model.norm.weight"].dtype
    return next(array.dtype for array in params.values() if mx.issubdtype(array.dtype, mx.floating))


def adapter_constants(base: Params, model: ModelConfig, scales: Mapping[str, float], dora: bool) -> Params:
    """Returns the constants of the adapters of the matrices in `scales` (model/linear.py): their scales and, with DoRA,
    the row norms of the base weights, float32."""
    if model.architecture == "mlx_lm":
        return mlx_lm_frozen.adapter_constants(base, model, scales, dora)
    constants: Params = {}
    for name, scale in scales.items():
        constants[f"{name}.lora_scale"] = mx.array(scale, mx.float32)
        if dora:
            w = matrix(base, name)
            plain = w.dequantize() if isinstance(w, Quantized) else w
            constants[f"{name}.row_norms"] = mx.linalg.norm(plain.astype(mx.float32), axis=1)
            mx.eval(constants[f"{name}.row_norms"])
    mx.eval(constants)
    return constants
