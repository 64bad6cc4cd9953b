"""Quantizes the matrices of an export for mlx-lm, with the result of its `mlx_lm.convert` (affine mode)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from anarchobot.exchange.dtypes import Dtype, Float32, rounded
from anarchobot.model.quantization import Array, Packing, parts_of, quantize


class MlxQuantization(NamedTuple):
    """Integers of `bits` bits, with a scale and a bias for `group_size` columns. `mixed`: the bits of the matrices that
    lose most, as in mlx-lm's recipes mixed_2_6, mixed_3_4, mixed_3_6 and mixed_4_6; None: all have the same."""

    bits: int
    group_size: int = 64
    mixed: int | None = None

    def __str__(self) -> str:
        bits = f"{self.bits}" if self.mixed is None else f"{self.bits} and {self.mixed}"
        return f"{bits} bits in groups of {self.group_size}"


def quantize_parameters(
    params: Mapping[str, Float32], n_layers: int, how: MlxQuantization, dtype: Dtype
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Returns the arrays of a folder, integers as uint32, and the value of `quantization` in its config.json. Weights
    are rounded to `dtype` first, as mlx-lm does. Matrices whose rows can't be divided into groups stay as they are."""
    arrays: dict[str, Array] = {}
    setting: dict[str, Any] = _entry(how.bits, how.group_size)
    for name, array in params.items():
        if array.ndim == 1 or array.shape[1] % how.group_size:
            arrays[name] = array
            continue
        bits = how.mixed if how.mixed is not None and _is_sensitive(name, n_layers) else how.bits
        weight, *others = quantize(rounded(name, array, dtype), Packing(bits, how.group_size))
        arrays |= zip(parts_of(name), (weight.reshape(len(weight), -1), *others), strict=True)
        if bits != how.bits:
            setting[name.removesuffix(".weight")] = _entry(bits, how.group_size)
    return arrays, setting


def _entry(bits: int, group_size: int) -> dict[str, Any]:
    return {"group_size": group_size, "bits": bits, "mode": "affine"}


def _is_sensitive(name: str, n_layers: int) -> bool:
    """The output head, and the values and down projections of the first and last eighth of the layers and every third
    layer between: mlx-lm's recipes, after llama.cpp's Q4_K_M. https://github.com/ml-explore/mlx-lm, convert.py"""
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
    eighth = n_layers // 8
    more = layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
    return "lm_head" in name or (more and ("v_proj" in name or "down_proj" in name))
