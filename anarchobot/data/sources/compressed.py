"""Streams plain, gzip and Zstandard files. A truncated or damaged file is read up to the damage."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from anarchobot.data.sources.files import PACKED, FileRange, lower_suffix

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 2**16  # bytes decompressed at once
# A line, or a file that is read at once, may have this many bytes, or this many times those of the compressed file.
SMALL, RATIO = 2**25, 100


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


def most_bytes(path: Path) -> int:
    """How many bytes of a compressed file may be in memory at once: a line can expand ten-thousandfold."""
    return max(SMALL, RATIO * path.stat().st_size)


def _most_bytes(path: Path) -> int:
    return most_bytes(path) if lower_suffix(path) in PACKED else path.stat().st_size


def read_all(path: Path) -> bytes:
    """Raises ValueError when the file is truncated or damaged, or expands too much; OSError when it can't be read."""
    most, size, blocks = _most_bytes(path), 0, []
    with DecompressedFile(path) as file:
        while block := file.read(BLOCK):
            blocks.append(block)
            size += len(block)
            if size > most:
                raise too_large(path, most)
        if file.damage:
            raise ValueError(f"truncated or damaged after {size:,} bytes: {file.damage}")
    return b"".join(blocks)


def read_lines(file_range: FileRange) -> Iterator[tuple[int, bytes | ValueError]]:
    """Yields (line number from 1, line with its end); lines end at byte 0x0A only. Only plain files can be split.

    Where the file is truncated or damaged, the last item is a ValueError in place of the incomplete line. A line that
    expands too much is replaced by a ValueError.
    """
    path, start, end = file_range
    if start or end is not None:
        yield from _lines_between(path, start, end)
        return
    number, most = 0, _most_bytes(path)
    with DecompressedFile(path) as raw, io.BufferedReader(raw, BLOCK) as file:
        while line := file.readline(most + 1):
            if len(line) > most:
                while line and not line.endswith(b"\n"):
                    line = file.readline(BLOCK)
                number += 1
                yield number, too_large(path, most)
                continue
            if raw.damage and not line.endswith(b"\n"):
                break
            number += 1
            yield number, line
        if raw.damage:
            yield number + 1, ValueError(f"truncated or damaged here: {raw.damage}")


def too_large(path: Path, most: int) -> ValueError:
    size = path.stat().st_size
    return ValueError(f"expands to more than {most:,} bytes, which is too much for a file of {size:,} bytes")


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
