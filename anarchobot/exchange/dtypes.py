"""Converts float32 weights to float16 and bfloat16.

NumPy has no bfloat16, so it is stored as uint16: the upper half of a float32.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
Float32 = npt.NDArray[np.float32]


def to_dtype(name: str, array: Float32, dtype: Dtype) -> npt.NDArray[Any]:
    """Rounds to the nearest value of `dtype`, ties to even; bfloat16 is returned as uint16 bits.

    Raises UserError if a value of the parameter `name` overflows float16.
    """
    if dtype == "float32":
        return array
    if dtype == "float16":
        check_float16(name, array)
        return array.astype(np.float16)
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def check_float16(name: str, array: Float32) -> None:
    """Raises UserError if a value of the parameter `name` overflows float16."""
    if not (largest := float(np.abs(array).max(initial=0))) < 65520:  # which rounds to infinity
        raise UserError(f"{name}: value {largest:g} exceeds float16's maximum, 65504: use bfloat16 or float32")


def rounded(name: str, array: Float32, dtype: Dtype) -> Float32:
    """Rounds to the nearest value of `dtype`, and back to float32. Raises UserError like `to_dtype`."""
    stored = to_dtype(name, array, dtype)
    return from_bfloat16(stored) if dtype == "bfloat16" else stored.astype(np.float32, copy=False)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Float32:
    return (bits.astype(np.uint32) << 16).view(np.float32)
