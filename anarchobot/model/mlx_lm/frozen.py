"""Weights of models that mlx-lm computes: their dtypes, quantization, and the constants of adapters.

A quantized layer NAME is NAME.weight (uint32), NAME.scales and, in affine mode, NAME.biases, with the shapes of mlx-lm.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from anarchobot.config.schema import ModelConfig
from anarchobot.model.gradient_accumulator import Params
from anarchobot.model.mlx_lm.adapters import ADAPTER_ENTRIES
from anarchobot.model.mlx_lm.module import network

Module = Any  # of mlx.nn, which has no types

GROUP = 64  # columns of a quantized matrix that share a scale and a bias: mlx-lm's default


def cast_weights(params: Params, model: ModelConfig, dtype: mx.Dtype) -> Params:
    """Casts floating-point arrays to `dtype`, except adapters and those that mlx-lm never casts, such as the biases of
    some routers."""
    others = [name for name, array in params.items() if array.dtype not in (dtype, mx.uint32, mx.uint8)]
    others = [name for name in others if name.rpartition(".")[2] not in ADAPTER_ENTRIES]
    if not others:
        return params
    keeps_dtype = network(model, {}).keeps_dtype
    return params | {name: params[name].astype(dtype) for name in others if not keeps_dtype(name)}


def frozen_weights(weights: Mapping[str, Any], model: ModelConfig, dtype: mx.Dtype, bits: int | None = None) -> Params:
    """Reads weights one at a time. Floating-point arrays become `dtype`; with `bits` (4 or 8), layers are quantized as
    mlx-lm's convert does; layers that are quantized already stay as they are."""
    frozen: Params = {}
    names = list(weights)
    packed = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    for name in names:
        part = cast_weights({name: mx.array(weights[name])}, model, dtype)
        path = name.removesuffix(".weight")
        if bits is not None and path != name and path not in packed:
            part = _quantized(path, part[name], model, bits)
        mx.eval(part)  # frees what was read before the next one is read
        frozen |= part
    return frozen


def _quantized(path: str, weight: mx.array, model: ModelConfig, bits: int) -> Params:
    net = network(model, {})
    layer = net.owners[path]
    settings: bool | dict[str, Any] = hasattr(layer, "to_quantized") and weight.shape[-1] % GROUP == 0
    if settings and (predicate := getattr(net.module, "quant_predicate", None)) is not None:
        settings = predicate(path, layer)
    if not settings:
        return {f"{path}.weight": weight}
    how: dict[str, Any] = {"group_size": GROUP, "bits": bits} | (settings if isinstance(settings, dict) else {})
    packed, scales, biases = mx.quantize(weight, **how)
    return {f"{path}.weight": packed, f"{path}.scales": scales, f"{path}.biases": biases}


def adapter_constants(base: Params, model: ModelConfig, scales: Mapping[str, float], dora: bool) -> Params:
    """Returns the constants of the adapters of the layers in `scales`: their scales and, with DoRA, the row norms of
    the base weights, float32."""
    constants: Params = {}
    for name, scale in scales.items():
        constants[f"{name}.lora_scale"] = mx.array(scale, mx.float32)
        if dora:
            weight = dequantize(name, base, model).astype(mx.float32)
            constants[f"{name}.row_norms"] = mx.linalg.norm(weight, axis=-1)
            mx.eval(constants[f"{name}.row_norms"])
    mx.eval(constants)
    return constants


def dequantize(path: str, params: Params, model: ModelConfig) -> mx.array:
    """The weight of a layer: in its dtype or, if quantized, float32. MLX would round it to the dtype of the scales."""
    if f"{path}.scales" not in params:
        return params[f"{path}.weight"]
    layer: Module = network(model, params).owners[path]
    how: dict[str, Any] = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    how |= {key: params[name] for key in ("scales", "biases") if (name := f"{path}.{key}") in params}
    for key in ("scales", "biases"):  # the scales of mxfp4 are bits of another format
        if key in how and mx.issubdtype(how[key].dtype, mx.floating):
            how[key] = how[key].astype(mx.float32)
    weight: mx.array = mx.dequantize(params[f"{path}.weight"], **how)
    return weight


class Dequantized(Mapping[str, npt.NDArray[np.float32]]):
    """The parameters of `weights` in float32 for NumPy, dequantized when they are accessed."""

    def __init__(self, weights: Mapping[str, Any], model: ModelConfig) -> None:
        self._weights, self._model = weights, model
        self._stored = set(weights)
        self._names = list(network(model, {}).shapes)

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        path = name.removesuffix(".weight")
        if path == name or f"{path}.scales" not in self._stored:
            return np.array(mx.array(self._weights[name]).astype(mx.float32))
        parts = (f"{path}.{part}" for part in ("weight", "scales", "biases", "global_scale"))
        arrays = {part: mx.array(self._weights[part]) for part in parts if part in self._stored}
        return np.array(dequantize(path, arrays, self._model).astype(mx.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
