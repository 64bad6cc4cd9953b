"""Files of bytes, plain or packed with gzip or Zstandard, as a stream; one that breaks off is read up to the break."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 2**16  # bytes unpacked at a time


class DecompressedFile(io.RawIOBase):
    """The unpacked bytes of a file. `broken` says why they end too early, or is empty.

    Of a file that is cut off, every byte that can be unpacked comes; of one that is damaged, all but the last block's.
    """

    def __init__(self, path: Path) -> None:
        self.broken = ""
        self._errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
        if path.suffix == ".gz":
            self._file: io.BufferedIOBase = gzip.GzipFile(path)
        elif path.suffix == ".zst":
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
            self.broken = str(error)
            return 0
        view[: len(block)] = block
        return len(block)

    def close(self) -> None:
        if hasattr(self, "_file") and not self.closed:  # without it where the file could not be opened
            self._file.close()
        super().close()


def read_all(path: Path) -> bytes:
    """All bytes of a file. Raises ValueError, with the place, where it breaks off; OSError when it can't be read."""
    with DecompressedFile(path) as file:
        raw = file.readall()
        if file.broken:
            raise ValueError(f"the file breaks off after {len(raw):,} bytes: {file.broken}")
    return raw


def read_lines(path: Path, start: int = 0, end: int | None = None) -> Iterator[tuple[int, bytes | ValueError]]:
    """(number from 1, line with its end), streamed; lines end at byte 0x0A only. Of a plain file, those alone that
    begin in its bytes [start, end).

    Where the file breaks off, a ValueError takes the place of the line that the break has cut, and is the last.
    """
    number = 0
    if start or end is not None:
        yield from _lines_between(path, start, end)
        return
    with DecompressedFile(path) as unpacked, io.BufferedReader(unpacked, BLOCK) as file:
        for number, line in enumerate(file, start=1):
            if unpacked.broken and not line.endswith(b"\n"):
                number -= 1
                break
            yield number, line
        if unpacked.broken:
            yield number + 1, ValueError(f"the file breaks off here: {unpacked.broken}")


def _lines_between(path: Path, start: int, end: int | None) -> Iterator[tuple[int, bytes]]:
    number = 0
    with path.open("rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # the rest of a line that begins before, or the end of the one before
        at = file.tell()
        while (end is None or at < end) and (line := file.readline()):
            number += 1
            at += len(line)
            yield number, line
