"""LoRA and DoRA on the linear layers of mlx-lm's modules, with mlx-lm's names and shapes.

    NAME.lora_a [in, r], NAME.lora_b [r, out], NAME.m [out]      a matrix, as in model/linear.py
    NAME.lora_a [E, r, in], NAME.lora_b [E, out, r]              the stacked matrices of E experts

A layer gets a subclass of its class, which adds the adapter to the output where its arrays are in the layer. The base
class computes the rest, quantized or not.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

Module = Any  # of mlx.nn, which has no types

ADAPTER_ENTRIES = ("lora_a", "lora_b", "m", "lora_scale", "row_norms")


class AdapterDropout:
    """Dropout on the inputs of adapters during a call: off without a `key`. A layer always drops the same elements for
    the same key."""

    def __init__(self) -> None:
        self.key: mx.array | None = None
        self.rate = 0.0
        self.layers: list[int] = []  # by id; a layer's key is numbered by its place here

    def __call__(self, layer: Module, x: mx.array) -> mx.array:
        if self.key is None or not self.rate:
            return x
        key = mx.random.split(self.key, len(self.layers))[self.layers.index(id(layer))]
        keep = mx.random.bernoulli(1 - self.rate, x.shape, key=key)
        return mx.where(keep, x * (1 / (1 - self.rate)), 0)


def make_adaptable(layers: Mapping[str, Module], dropout: AdapterDropout) -> dict[str, tuple[int, ...]]:
    """Prepares all linear layers for adapters. Returns the shapes of their weights, without quantization, by path:
    [out, in], or [experts, out, in]."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    shapes: dict[str, tuple[int, ...]] = {}
    for path, layer in layers.items():
        if isinstance(layer, SwitchLinear | QuantizedSwitchLinear):
            shapes[path] = (layer.num_experts, layer.output_dims, layer.input_dims)
            _subclass(layer, _adapted_experts, dropout)
        elif type(layer) in (Linear, QuantizedLinear):
            rows, columns = layer.weight.shape
            bits = getattr(layer, "bits", 32)
            shapes[path] = (rows, columns * 32 // bits)
            _subclass(layer, _adapted, dropout)
    return shapes


def _subclass(layer: Module, call: Any, dropout: AdapterDropout) -> None:
    base = type(layer)
    dropout.layers.append(id(layer))

    def __call__(self: Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        if "lora_a" not in self:
            return base.__call__(self, x, *args, **kwargs)
        return call(base, self, x, dropout, *args, **kwargs)

    layer.__class__ = type(base.__name__, (base,), {"__call__": __call__})


def _factors(layer: Any, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """A and s B."""
    return layer["lora_a"].astype(dtype), (layer["lora_b"] * layer["lora_scale"]).astype(dtype)


def _adapted(base: Any, layer: Any, x: mx.array, dropout: AdapterDropout) -> mx.array:
    """x W^T + s (dropout(x) A) B + bias; with DoRA, all but the bias times m / c, where c, the row norms of the adapted
    weight, has no gradient (model/linear.py)."""
    a, b = _factors(layer, x.dtype)
    y: mx.array = base.__call__(layer, x)
    update = (dropout(layer, x) @ a) @ b
    if "m" not in layer:
        return y + update.astype(y.dtype)
    bias: mx.array | None = layer.get("bias")
    plain = y if bias is None else y - bias
    magnitude = (layer["m"] / _adapted_row_norms(base, layer, x.dtype)).astype(y.dtype)
    y = (plain + update.astype(y.dtype)) * magnitude
    return y if bias is None else y + bias


def _adapted_row_norms(base: Any, layer: Any, dtype: mx.Dtype) -> mx.array:
    """c [out], float32; see _row_norms in model/linear.py."""
    a, b = layer["lora_a"], layer["lora_b"] * layer["lora_scale"]
    across = base.__call__(layer, a.T.astype(dtype))
    if "bias" in layer:
        across = across - layer["bias"]
    inner = 2 * across.astype(mx.float32) + (a.T @ a) @ b
    squares = mx.square(layer["row_norms"]) + mx.sum(b * inner, axis=0)
    return mx.stop_gradient(mx.sqrt(mx.maximum(squares, 1e-24)))


def _adapted_experts(
    base: Any, layer: Any, x: mx.array, dropout: AdapterDropout, indices: mx.array, sorted_indices: bool = False
) -> mx.array:
    """Each token's experts are chosen by `indices`, as in mlx-lm's SwitchLinear."""
    a, b = _factors(layer, x.dtype)
    y: mx.array = base.__call__(layer, x, indices, sorted_indices=sorted_indices)
    z = dropout(layer, x)
    for factor in (a, b):
        z = mx.gather_mm(z, factor.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=sorted_indices)
    return y + z.astype(y.dtype)
