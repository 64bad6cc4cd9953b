"""The names of files, folders and globs to the files themselves: text, JSONL and Parquet, packed or not."""

import glob
import importlib
from collections.abc import Iterable
from pathlib import Path

from anarchobot.config.errors import UserError, did_you_mean

PLAIN = (".txt", ".md", ".jsonl")
SUFFIXES = (*PLAIN, *(plain + packed for plain in PLAIN for packed in (".gz", ".zst")), ".parquet")
EXPECTED = ".txt, .md, .jsonl (or these with .gz or .zst) or .parquet file"


# What a kind of file needs beside the standard library: a package, which is also the module.
_NEEDS = {".zst": "backports.zstd", ".parquet": "pyarrow"}


class EmptyFile(UserError):
    """A file without any document."""


def find(names: Iterable[str]) -> list[Path]:
    """The files of all names, in the order given; folders and globs sorted by name.

    Raises UserError for a name that matches nothing, and where a file's kind needs a package that isn't installed.
    """
    paths = [path for name in names for path in _matches(name)]
    for suffix, package in _NEEDS.items():
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
        found = _ours(path.rglob("*"))
        if not found:
            raise UserError(f"{name}: no {EXPECTED} in this folder")
        return found
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{name}: expected a {EXPECTED}: rename it, or convert it to one of these")
        return [path]
    if glob.has_magic(name):
        found = _ours(map(Path, glob.glob(name, recursive=True)))
        if found:
            return found
        raise UserError(f"{name}: matches no {EXPECTED}")
    near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UserError(f"{name}: no such file or folder{near}")


def _ours(paths: Iterable[Path]) -> list[Path]:
    return sorted(path for path in paths if path.name.endswith(SUFFIXES) and path.is_file())
