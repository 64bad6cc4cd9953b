"""Matrices quantized in their folder, as mlx-lm stores them (affine mode). Does not import MLX.

A matrix NAME.weight [out, in] is three arrays, in files and in memory (model/linear.py):

    NAME.weight uint32 [out, in bits / 32]   integers q of `bits` bits, the first column in the lowest bits
    NAME.scales [out, in / group_size]       w = scale q + bias, with one scale and bias for `group_size` columns
    NAME.biases [out, in / group_size]

32 columns take exactly `bits` words. In memory the integers are [out, in / 32, bits], so that the shapes alone tell
the width, the bits and the group size.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.config.schema import ModelConfig
from anarchobot.model.parameters import parameter_shapes

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
PARTS = ("weight", "scales", "biases")
Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


class Packing(NamedTuple):
    """How a matrix is quantized."""

    bits: int
    group_size: int


def parts_of(name: str) -> tuple[str, str, str]:
    """The names of the three arrays of the parameter `name`, "....weight"."""
    module = name.removesuffix(".weight")
    return f"{module}.weight", f"{module}.scales", f"{module}.biases"


def find_packing(shape: tuple[int, ...], weight: tuple[int, ...], scales: tuple[int, ...]) -> Packing | None:
    """The packing of a matrix of this shape, given the shapes of its stored integers and scales; None if they are not
    those of a quantized matrix."""
    rows, columns = shape
    for bits in BITS:
        for group_size in GROUP_SIZES:
            packed = (rows, columns * bits // 32), (rows, columns // group_size)
            if columns % group_size == 0 and packed == (weight, scales):
                return Packing(bits, group_size)
    return None


def to_setting(packings: Mapping[str, Packing], model: ModelConfig) -> str | None:
    """The value of model.quantization: JSON in the form of mlx-lm's `quantization`, with the most frequent packing and
    the matrices that differ from it. `packings` has the quantized matrices by parameter name."""
    if not packings:
        return None
    (default, _), *_ = Counter(packings.values()).most_common(1)
    values: dict[str, Any] = default._asdict()
    for name, shape in parameter_shapes(model).items():
        if len(shape) == 2 and packings.get(name) != default:
            values[name.removesuffix(".weight")] = packings[name]._asdict() if name in packings else False
    return json.dumps(values)


def packings(model: ModelConfig) -> dict[str, Packing]:
    """The inverse of `to_setting`. Raises UserError if model.quantization is not such a text."""
    if model.quantization is None:
        return {}
    return _parse(model) if model.architecture == "llama" else _most_frequent(model, model.quantization)


def _most_frequent(model: ModelConfig, quantization: str) -> dict[str, Packing]:
    """Of models that mlx-lm computes, whose folders have more forms: only how most matrices are quantized, for all."""
    packing = Packing(**json.loads(quantization))
    return {
        name: packing
        for name, shape in parameter_shapes(model).items()
        if len(shape) >= 2 and name.endswith(".weight") and shape[-1] % packing.group_size == 0
    }


@lru_cache(maxsize=4)
def _parse_text(text: str) -> dict[str, Packing | None]:
    values = json.loads(text)
    overrides = {name: value for name, value in values.items() if name not in Packing._fields}
    found: dict[str, Packing | None] = {"": Packing(values["bits"], values["group_size"])}
    for name, value in overrides.items():
        found[f"{name}.weight"] = Packing(value["bits"], value["group_size"]) if value else None
    sizes = (16, *GROUP_SIZES)  # 16 in nvfp4, which mlx-lm's modules compute
    if any(p is not None and (p.bits not in BITS or p.group_size not in sizes) for p in found.values()):
        raise ValueError(f"bits must be one of {BITS} and group_size one of {sizes}")
    return found


def _parse(model: ModelConfig) -> dict[str, Packing]:
    assert model.quantization is not None
    try:
        found = _parse_text(model.quantization)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:100]
        raise UserError(f"model.quantization: expected JSON with bits and group_size ({problem}): remove it") from error
    matrices = [name for name, shape in parameter_shapes(model).items() if len(shape) > 1]  # experts are stacked
    each = {name: found.get(name, found[""]) for name in matrices}
    return {name: packing for name, packing in each.items() if packing is not None}


def describe(quantization: str) -> str:
    """A value of model.quantization for messages: "4 bits", or "4 to 6 bits" where matrices differ."""
    bits = sorted({int(digits) for digits in re.findall(r'"bits": (\d+)', quantization)}) or [0]
    return f"{bits[0]} bits" if len(bits) == 1 else f"{bits[0]} to {bits[-1]} bits"


def check_format(values: Mapping[str, Any], file: str) -> None:
    """Raises UserError if a config.json describes quantized weights in another format than mlx-lm's affine mode."""
    settings = values.get("quantization")
    if settings is None:
        if other := values.get("quantization_config"):
            method = other.get("quant_method", "unknown") if isinstance(other, dict) else other
            raise UserError(
                f"{file}: quantization_config: weights quantized by {method} are not supported: use the original "
                "model, or one quantized by mlx-lm"
            )
        return
    if not isinstance(settings, dict):
        raise UserError(f"{file}: quantization: expected a JSON object, got {settings!r}")
    for value in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if (mode := value.get("mode", "affine")) != "affine":
            raise UserError(f"{file}: quantization: mode {mode!r} is not supported: expected affine")


def quantize(array: Float32, packing: Packing) -> tuple[Array, Float32, Float32]:
    """The integers, in memory form, scales and biases that `mx.quantize` makes of a matrix [out, in].

    The integers of a group of columns count multiples of its scale from the end of its range with the larger magnitude,
    the bias. The scale is adjusted so that zero stays exactly zero.
    """
    groups = array.reshape(len(array), -1, packing.group_size)
    low, high = groups.min(axis=2), groups.max(axis=2)
    steps = np.float32(2**packing.bits - 1)
    scales = np.maximum((high - low) / steps, np.float32(1e-7))
    far_low = np.abs(low) > np.abs(high)
    scales, edges = np.where(far_low, scales, -scales), np.where(far_low, low, high)
    at_zero = np.rint(edges / scales)
    scales = np.where(at_zero != 0, edges / np.where(at_zero != 0, at_zero, 1), scales)
    biases = np.where(at_zero != 0, edges, np.float32(0))
    integers = np.clip(np.rint((groups - biases[..., None]) / scales[..., None]), 0, steps).astype(np.uint32)
    return _pack(integers.reshape(len(array), -1, 32), packing.bits), scales, biases


def _pack(columns: Array, bits: int) -> Array:
    """Integers of `bits` bits [out, in / 32, 32] as words [out, in / 32, bits]."""
    words = np.zeros((*columns.shape[:2], bits), np.uint32)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[..., word] |= columns[..., i] << np.uint32(shift)
        if shift + bits > 32:  # continues in the next word
            words[..., word + 1] |= columns[..., i] >> np.uint32(32 - shift)
    return words


def dequantize(weight: Array, scales: Float32, biases: Float32) -> Float32:
    """float32 [out, in] of integers in memory form, [out, in / 32, bits]."""
    rows, blocks, bits = weight.shape
    values = np.empty((rows, blocks, 32), np.float32)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        column = weight[..., word] >> np.uint32(shift)
        if shift + bits > 32:  # continues in the next word
            column |= weight[..., word + 1] << np.uint32(32 - shift)
        values[..., i] = column & np.uint32(2**bits - 1)
    groups = values.reshape(*scales.shape, -1)
    with np.errstate(over="ignore", invalid="ignore"):  # of damaged scales: callers check for infinities
        groups *= scales[..., None]
        groups += biases[..., None]
    return groups.reshape(rows, -1)


class Dequantized(Mapping[str, Float32]):
    """The parameters of `weights` in float32, dequantized when they are accessed."""

    def __init__(self, weights: Mapping[str, Array]) -> None:
        self._weights = weights
        self._stored = set(weights)
        self._names = [name for name in weights if not name.endswith((".scales", ".biases"))]

    def __getitem__(self, name: str) -> Float32:
        parts = parts_of(name)
        return dequantize(*(self._weights[part] for part in parts)) if parts[1] in self._stored else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
