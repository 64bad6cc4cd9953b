"""Reads and writes safetensors files: an 8-byte header length, a JSON header, then the tensors' bytes.

The safetensors package has no bfloat16 for NumPy, so this reads and writes the format directly.
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from anarchobot.config.errors import UserError
from anarchobot.exchange.dtypes import Dtype, Float32, from_bfloat16, to_dtype
from anarchobot.storage.file_ranges import Part, check_parts

_CODES: dict[Dtype, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_NUMPY_TYPES: dict[str, type[np.generic]] = {
    "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U32": np.uint32
}  # fmt: skip
Array = npt.NDArray[Any]
MAX_ELEMENTS = 2**48
MAX_DIMENSIONS = 8  # models have at most 2; NumPy's limit depends on its version
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


def write(path: Path, tensors: Mapping[str, Array], dtype: Dtype, metadata: Mapping[str, str]) -> None:
    """Writes float32 arrays as `dtype` and uint32 arrays, the integers of quantized matrices, as they are. Raises
    UserError if a value overflows `dtype`."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name, array in tensors.items():
        code = "U32" if array.dtype == np.uint32 else _CODES[dtype]
        end = start + array.size * np.dtype(_NUMPY_TYPES[code]).itemsize
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the data to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors.items():
            stored = array if array.dtype == np.uint32 else to_dtype(name, array, dtype)
            file.write(np.ascontiguousarray(stored).data)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `code` is its dtype as safetensors names it; it takes the bytes [offset, end) of the file."""

    path: Path
    code: str
    shape: tuple[int, ...]
    offset: int
    end: int

    def load(self) -> Float32:
        """Converted to float32, if it is not."""
        array = self.load_stored()
        return from_bfloat16(array) if self.code == "BF16" else array.astype(np.float32, copy=False)

    def load_stored(self) -> npt.NDArray[Any]:
        """In the stored dtype; bfloat16 as uint16."""
        count = math.prod(self.shape)
        return np.fromfile(self.path, _NUMPY_TYPES[self.code], count, offset=self.offset).reshape(self.shape)


def read(path: Path, any_dtype: bool = False) -> dict[str, StoredTensor]:
    """Returns a file's tensors by name, without loading them.

    Raises UserError if the file is not a safetensors file, is truncated, has tensors that overlap, or, unless
    `any_dtype`, another dtype than float32, float16, bfloat16 and uint32 (quantized matrices).
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER_BYTES:
            raise UserError(f"{path}: not a safetensors file")
        text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path}: truncated in the header: copy it again")
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: _parse_entry(path, 8 + length, **entry) for name, entry in entries.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file ({' '.join(str(error).split())[:100]})") from error
    for name, tensor in tensors.items():
        if tensor.code not in _NUMPY_TYPES and not any_dtype:
            raise UserError(f"{path}: {name}: dtype {tensor.code}, expected one of {', '.join(_NUMPY_TYPES)}")
    try:
        check_parts((Part(name, tensor.offset, tensor.end) for name, tensor in tensors.items()), size)
    except ValueError as error:
        raise UserError(f"{path}: {error}: copy it again") from error
    return tensors


def _parse_entry(path: Path, data_start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> StoredTensor:
    """Parses a tensor's header entry. Raises ValueError or TypeError if it is malformed."""
    start, end = data_offsets
    if not isinstance(dtype, str) or any(type(n) is not int or n < 0 for n in [*shape, start, end]) or end < start:
        raise ValueError("malformed header entry")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{len(shape)} dimensions, at most {MAX_DIMENSIONS}")
    if math.prod(n for n in shape if n) > MAX_ELEMENTS:  # NumPy refuses such a shape, even if another dimension is 0
        raise ValueError("shape too large")
    if dtype in _NUMPY_TYPES and end - start != math.prod(shape) * np.dtype(_NUMPY_TYPES[dtype]).itemsize:
        raise ValueError("shape and data_offsets in the header disagree")
    return StoredTensor(path, dtype, tuple(shape), data_start + start, data_start + end)
