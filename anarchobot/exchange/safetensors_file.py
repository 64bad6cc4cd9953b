"""safetensors files, read and written: eight bytes of length, a JSON header, the tensors one behind the other.

The format is so small that its own package would save nothing, and that one has no bfloat16 for numpy.
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anarchobot.config.errors import UserError
from anarchobot.exchange.dtypes import Dtype, Float32, narrowed, widened

_CODES: dict[Dtype, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STORED: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
MOST_HEADER = 100_000_000  # bytes: the format's own limit


def write(path: Path, tensors: Mapping[str, Float32], dtype: Dtype, metadata: Mapping[str, str]) -> None:
    """Writes all `tensors` as `dtype`. Raises UserError when a value is out of its range."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, array in tensors.items():
        end = start + array.size * _WIDTH[dtype]
        header[name] = {"dtype": _CODES[dtype], "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors.items():
            file.write(np.ascontiguousarray(narrowed(name, array, dtype)).data)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its type's code, its shape, and where its bytes begin."""

    path: Path
    code: str
    shape: tuple[int, ...]
    offset: int

    def load(self) -> Float32:
        """The tensor in float32. Raises UserError for a type that is none of float32, float16 and bfloat16."""
        array = np.fromfile(self.path, _STORED[self.code], math.prod(self.shape), offset=self.offset)
        wide: Float32 = widened(array) if self.code == "BF16" else array.astype(np.float32, copy=False)
        return wide.reshape(self.shape)


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; none is loaded yet.

    Raises UserError when it is no safetensors file, ends early, or holds another type of numbers.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MOST_HEADER:
            raise UserError(f"{path}: not a safetensors file")
        text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path}: ends early, in its header: copy it again")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        found = {name: _stored(path, 8 + length, **entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file ({' '.join(str(error).split())[:100]})") from error
    for name, tensor in found.items():
        if tensor.code not in _STORED:
            raise UserError(f"{path}: {name} is {tensor.code}: expected one of {', '.join(_STORED)}")
        end = tensor.offset + math.prod(tensor.shape) * np.dtype(_STORED[tensor.code]).itemsize
        if end > size:
            raise UserError(f"{path}: ends early: {size:,} bytes, and {name} goes to byte {end:,}: copy it again")
    return found


def _stored(path: Path, data: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> Stored:
    """A header's entry, `data` being where the tensors begin. Raises ValueError or TypeError for what is none."""
    start, end = data_offsets
    whole = [*shape, start, end]
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in whole):
        raise ValueError("its header has other than sizes and offsets")
    if dtype in _STORED and end - start != math.prod(shape) * np.dtype(_STORED[dtype]).itemsize:
        raise ValueError("its header's sizes and offsets don't agree")
    return Stored(path, dtype, tuple(shape), data + start)
