"""A corpus cut into parts that are read apart: whole files, and ranges of bytes of files whose lines are documents."""

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from anarchobot.config.schema import DataConfig


class FileRange(NamedTuple):
    """The lines of a file that begin in its bytes [start, end); `end` None: up to the end of the file."""

    path: Path
    start: int = 0
    end: int | None = None

    @property
    def name(self) -> str:
        return f"{self.path} from byte {self.start}" if self.start else str(self.path)


def split_files(paths: Iterable[Path], parts: int, data: DataConfig) -> list[list[FileRange]]:
    """The files as `parts` lists of spans of about as many bytes each, some perhaps empty; one after another they are
    the files in their order. A file that can't be cut is in the part that its first byte falls in."""
    found = list(paths)
    sizes = [path.stat().st_size for path in found]
    total = sum(sizes)
    ends = [total * part // parts for part in range(1, parts)]  # the last part has no end
    spans: list[list[FileRange]] = [[] for _ in range(parts)]
    begin = 0
    for path, size in zip(found, sizes, strict=True):
        part, start = bisect_right(ends, begin), 0
        if _lines_are_documents(path, data):
            while part < len(ends) and ends[part] < begin + size:
                spans[part].append(FileRange(path, start, ends[part] - begin))
                start = ends[part] - begin
                part = bisect_right(ends, begin + start)
        spans[part].append(FileRange(path, start))
        begin += size
    return spans


def _lines_are_documents(path: Path, data: DataConfig) -> bool:
    return path.suffix == ".jsonl" or (path.suffix in (".txt", ".md") and data.documents == "lines")
