"""Streams plain, gzip and Zstandard files. A truncated or damaged file is read up to the damage."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from anarchobot.data.sources.files import FileRange, lower_suffix

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 2**16  # bytes decompressed at once


class DecompressedFile(io.RawIOBase):
    """The decompressed bytes of a file. `damage` says why they end too early, or is empty.

    A truncated file yields every byte that can be decompressed; a damaged one, everything before the damaged block.
    """

    def __init__(self, path: Path) -> None:
        self.damage = ""
        self._errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
        if lower_suffix(path) == ".gz":
            self._file: io.BufferedIOBase = gzip.GzipFile(path)
        elif lower_suffix(path) == ".zst":
            from backports import zstd

            self._file = zstd.ZstdFile(path)
            self._errors = (EOFError, zstd.ZstdError)
        else:
            self._file = path.open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        try:
            block = self._file.read1(len(view))
        except self._errors as error:
            self.damage = str(error)
            return 0
        view[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if hasattr(self, "_file") and not self.closed:  # missing when the file could not be opened
            self._file.close()
        super().close()


def read_all(path: Path) -> bytes:
    """Raises ValueError when the file is truncated or damaged; OSError when it can't be read."""
    with DecompressedFile(path) as file:
        raw = file.readall()
        if file.damage:
            raise ValueError(f"truncated or damaged after {len(raw):,} bytes: {file.damage}")
    return raw


def read_lines(file_range: FileRange) -> Iterator[tuple[int, bytes | ValueError]]:
    """Yields (line number from 1, line with its end); lines end at byte 0x0A only. Only plain files can be split.

    Where the file is truncated or damaged, the last item is a ValueError in place of the incomplete line.
    """
    path, start, end = file_range
    if start or end is not None:
        yield from _lines_between(path, start, end)
        return
    number = 0
    with DecompressedFile(path) as raw, io.BufferedReader(raw, BLOCK) as file:
        for number, line in enumerate(file, start=1):
            if raw.damage and not line.endswith(b"\n"):
                number -= 1
                break
            yield number, line
        if raw.damage:
            yield number + 1, ValueError(f"truncated or damaged here: {raw.damage}")


def _lines_between(path: Path, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    number = 0
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that begins earlier, or just the end of the previous one
        at = file.tell()
        while (end is None or at < end) and (line := file.readline()):
            number += 1
            at += len(line)
            yield number, line
