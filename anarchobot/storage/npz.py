"""Reads .npz files in memory in proportion to their size: an array may claim any shape, and a compressed one expands up
to a thousandfold. `np.load` believes both.

Only arrays that are stored uncompressed are read, as `np.savez` and checkpoints write them. Their headers are checked
against the file before anything is loaded.
"""

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from anarchobot.storage.file_ranges import Part, check_parts

_KINDS, _MAX_ITEM = "biuf", 8  # dtypes: numbers of at most 64 bits


class Header(NamedTuple):
    """What an array's header says, checked against its size in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NpzReader:
    """The arrays of an open .npz file by name."""

    def __init__(self, archive: zipfile.ZipFile, headers: Mapping[str, Header]) -> None:
        self._archive, self.headers = archive, headers

    def load(self, name: str) -> npt.NDArray[Any]:
        """Raises ValueError or zipfile.BadZipFile if the array is damaged, KeyError if there is none."""
        with self._archive.open(f"{name}.npy") as member:
            array: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
            return array.astype(array.dtype.newbyteorder("="), copy=False)  # MLX has no other byte order


@contextmanager
def open_npz(path: Path) -> Iterator[NpzReader]:
    """Raises OSError, ValueError, RuntimeError or BadZipFile if the file can't be read, an array is compressed, or
    its header states another size than it has."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(
                    f"{member.filename} is compressed: {member.compress_size:,} bytes expand to {member.file_size:,}: "
                    "save it with np.savez"
                )
        parts = (Part(m.filename, m.header_offset, m.header_offset + m.compress_size) for m in members)
        check_parts(parts, path.stat().st_size)
        headers = {}
        for member in members:
            with archive.open(member) as file:
                name = member.filename.removesuffix(".npy")
                try:
                    headers[name] = read_header(file, member.file_size)
                except ValueError as error:
                    raise ValueError(f"{member.filename}: {error}") from error
        yield NpzReader(archive, headers)


def read_header(file: IO[bytes], size: int) -> Header:
    """Reads the header of an open .npy file of `size` bytes. Raises ValueError if there is none, or it does not state
    the size of the array."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"format version {version[0]}.{version[1]}, expected 1.0 or 2.0")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read(file)
    except Exception as error:  # NumPy evaluates the header as Python, so damage can raise anything
        raise ValueError(f"damaged header ({error})") from error
    if dtype.kind not in _KINDS or dtype.itemsize > _MAX_ITEM:
        raise ValueError(f"dtype {dtype}, expected numbers")
    stated, actual = math.prod(shape) * dtype.itemsize, size - file.tell()
    if stated != actual:
        raise ValueError(f"shape {list(shape)} takes {stated:,} bytes, but it has {actual:,}")
    return Header(shape, dtype)
