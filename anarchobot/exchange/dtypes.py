"""float32 weights in fewer bits, and back. numpy has no bfloat16: it is the upper half of a float32, kept as uint16."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
Float32 = npt.NDArray[np.float32]


def narrowed(name: str, array: Float32, dtype: Dtype) -> npt.NDArray[Any]:
    """`array` rounded to the nearest of `dtype`, ties to even: float32, float16, or bfloat16's bits as uint16.

    Raises UserError when a value is out of its range; `name` is the parameter's.
    """
    if dtype == "float32":
        return array
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if not np.isfinite(half).all():
            most = float(np.abs(array).max())
            raise UserError(f"{name}: holds {most:g}, and float16 ends at 65504: export it as bfloat16 or float32")
        return half
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widened(bits: npt.NDArray[np.uint16]) -> Float32:
    """bfloat16's bits as the float32 of the same value."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
