"""Finds input files by name (text, JSONL and Parquet, compressed or not) and splits them into byte ranges."""

import glob
import importlib
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.schema import DataConfig

PLAIN = (".txt", ".md", ".jsonl")
SUFFIXES = (*PLAIN, *(plain + packed for plain in PLAIN for packed in (".gz", ".zst")), ".parquet")
EXPECTED = ".txt, .md, .jsonl (or these with .gz or .zst) or .parquet file"
_PACKAGES = {".zst": "backports.zstd", ".parquet": "pyarrow"}  # needed to read a suffix; also the module names


class EmptyFile(UserError):
    """A file without any document."""


class FileRange(NamedTuple):
    """The lines of a file that begin in bytes [start, end); `end` None: to the end of the file."""

    path: Path
    start: int = 0
    end: int | None = None

    @property
    def name(self) -> str:
        return f"{self.path} from byte {self.start}" if self.start else str(self.path)


def find(names: Iterable[str]) -> list[Path]:
    """The files of all names, in the order given; folders and globs sorted by name.

    Raises UserError for a name that matches nothing, and when a package needed to read a file is not installed.
    """
    paths = [path for name in names for path in _matches(name)]
    for suffix, package in _PACKAGES.items():
        first = next((path for path in paths if path.suffix == suffix), None)
        if first is not None:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise UserError(f"{first}: to read {suffix} files: pip install {package}") from error
    return paths


def _matches(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        paths = _supported(path.rglob("*"))
        if not paths:
            raise UserError(f"{name}: no {EXPECTED} in this folder")
        return paths
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{name}: expected a {EXPECTED}: rename or convert it")
        return [path]
    if glob.has_magic(name):
        paths = _supported(map(Path, glob.glob(name, recursive=True)))
        if paths:
            return paths
        raise UserError(f"{name}: matches no {EXPECTED}")
    hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UserError(f"{name}: no such file or folder{hint}")


def _supported(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.name.endswith(SUFFIXES) and path.is_file())


def split_files(paths: Iterable[Path], parts: int, data: DataConfig) -> list[list[FileRange]]:
    """Splits the files into `parts` lists of ranges with similar numbers of bytes; some may be empty.

    Concatenated, the lists are the files in order. A file that can't be split belongs to the part of its first byte.
    """
    paths = list(paths)
    sizes = [path.stat().st_size for path in paths]
    total = sum(sizes)
    ends = [total * part // parts for part in range(1, parts)]  # the last part is open-ended
    ranges: list[list[FileRange]] = [[] for _ in range(parts)]
    offset = 0
    for path, size in zip(paths, sizes, strict=True):
        part, start = bisect_right(ends, offset), 0
        if _is_line_based(path, data):
            while part < len(ends) and ends[part] < offset + size:
                ranges[part].append(FileRange(path, start, ends[part] - offset))
                start = ends[part] - offset
                part = bisect_right(ends, offset + start)
        ranges[part].append(FileRange(path, start))
        offset += size
    return ranges


def is_jsonl(path: Path) -> bool:
    return uncompressed_name(path).endswith(".jsonl")


def uncompressed_name(path: Path) -> str:
    """The file's name without .gz or .zst."""
    return path.name.removesuffix(".gz").removesuffix(".zst")


def _is_line_based(path: Path, data: DataConfig) -> bool:
    return path.suffix == ".jsonl" or (path.suffix in (".txt", ".md") and data.documents == "lines")
