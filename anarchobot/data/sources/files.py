"""Finds input files by name (text, JSONL, JSON, Parquet, PDF and others) and splits them into byte ranges.

What lies in a folder and is not read is listed with the reason. Suffixes may be in capitals.
"""

import glob
import importlib
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.schema import DataConfig

PACKED = (".gz", ".zst")
PLAIN = (".txt", ".md", ".jsonl")
JSON = (".json", *(".json" + packed for packed in PACKED))
DOCUMENT_FILES = (".pdf", ".docx", ".epub", ".html", ".htm", ".pptx")
SUFFIXES = (*PLAIN, *(plain + packed for plain in PLAIN for packed in PACKED), ".parquet", *DOCUMENT_FILES)
EXPECTED = ".txt, .md, .jsonl (or these with .gz or .zst), .parquet, .pdf, .docx, .epub, .html or .pptx file"
_MODULES = {  # needed to read a suffix
    ".zst": "backports.zstd",
    ".parquet": "pyarrow",
    ".pdf": "pypdf",
    ".html": "trafilatura",
    ".htm": "trafilatura",
    **dict.fromkeys((".docx", ".epub", ".pptx"), "markitdown"),
}
_DOCUMENTS_EXTRA = "'anarchobot[documents]'"
_WITHOUT_EXTRA = f"PDF, DOCX, EPUB, HTML and PPTX files (to read them: pip install {_DOCUMENTS_EXTRA})"
HIDDEN = "hidden or system files"
# Of archives made on a Mac; deleted files and indexes on disks of Windows, Synology and Linux.
_SYSTEM_FOLDERS = ("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found")
SHOWN = 3  # examples of each kind in a message


class Formats(NamedTuple):
    """The suffixes of the files that can be read, and how to name them in an error."""

    suffixes: tuple[str, ...]
    expected: str


DOCUMENTS = Formats(SUFFIXES, EXPECTED)
CONVERSATIONS = Formats(
    (".jsonl", *(".jsonl" + packed for packed in PACKED), *JSON, ".parquet"),
    ".jsonl, .json (or these with .gz or .zst) or .parquet file",
)


class Unread(NamedTuple):
    """A file or folder that lies in an input folder, or matches a glob, and is not read."""

    path: str
    reason: str


class EmptyFile(UserError):
    """A file without any document."""


class UnreadableFile(UserError):
    """A file without text that can be read: damaged, encrypted, or in another encoding than UTF-8. `kind`: such files,
    in a list of them."""

    def __init__(self, path: Path, kind: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.kind = kind


class FileRange(NamedTuple):
    """The lines of a file that begin in bytes [start, end); `end` None: to the end of the file."""

    path: Path
    start: int = 0
    end: int | None = None

    @property
    def name(self) -> str:
        return f"{self.path} from byte {self.start}" if self.start else str(self.path)


def find(names: Iterable[str], unread: list[Unread] | None = None, formats: Formats = DOCUMENTS) -> list[Path]:
    """The files of all names, in the order given; folders and globs sorted by name.

    Hidden files and folders and those that systems add to disks and archives are not read, but appended to `unread`, as
    is everything else that a folder or glob has and that is not in one of the `formats`, or needs the extra `documents`
    where it is not installed. Links are followed, and each real file and folder is read once. Raises UserError for a
    name that matches nothing, a folder that can't be listed, and when another package needed to read a file, or the
    extra for a file that is named itself, is not installed.
    """
    left_out: list[Unread] = [] if unread is None else unread
    paths = [path for name in names for path in _matches(name, left_out, formats)]
    for suffix, module in _MODULES.items():
        first = next((path for path in paths if lower_suffix(path) == suffix), None)
        if first is not None and not _is_installed(module):
            package = _DOCUMENTS_EXTRA if suffix in DOCUMENT_FILES else module
            raise UserError(f"{first}: to read {suffix} files: pip install {package}")
    return paths


def _is_installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def describe_unread(unread: Iterable[Unread]) -> list[str]:
    """One line per reason, with the number of files and up to three of them."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in unread:
        by_reason.setdefault(reason, []).append(path)
    return [
        f"{reason} not read: {len(paths):,} ({', '.join(paths[:SHOWN])}{', ...' if len(paths) > SHOWN else ''})"
        for reason, paths in by_reason.items()
    ]


def _matches(name: str, unread: list[Unread], formats: Formats) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        left_out: list[Unread] = []
        paths = _supported(_files_below(path, left_out), left_out, formats)
        unread += left_out
        if not paths:
            raise UserError(f"{name}: no {formats.expected} in this folder{_reasons(left_out)}")
        return paths
    if path.is_file():
        if not path.name.lower().endswith(formats.suffixes):
            raise UserError(f"{name}: expected a {formats.expected}: rename or convert it")
        return [path]
    if glob.has_magic(name):
        left_out = []
        paths = _supported(_files_of_glob(name, left_out), left_out, formats)
        unread += left_out
        if not paths:
            raise UserError(f"{name}: matches no {formats.expected}{_reasons(left_out)}")
        return paths
    hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UserError(f"{name}: no such file or folder{hint}")


def _reasons(unread: list[Unread]) -> str:
    return f"; {'; '.join(describe_unread(unread))}" if unread else ""


def _supported(paths: Iterable[Path], unread: list[Unread], formats: Formats) -> list[Path]:
    """The files that can be read, sorted; of a file and links to it, only the file."""
    real_paths: dict[Path, Path] = {}
    for path in sorted(paths):
        if not path.is_file():
            unread.append(Unread(str(path), "broken links or special files"))
        elif not path.name.lower().endswith(formats.suffixes):
            unread.append(Unread(str(path), "files of other formats"))
        elif is_document_file(path) and not _is_installed(_MODULES[lower_suffix(path)]):
            unread.append(Unread(str(path), _WITHOUT_EXTRA))
        else:
            real_paths[path] = path.resolve()
    first: dict[Path, Path] = {}
    for path in sorted(real_paths, key=lambda path: (path.is_symlink(), path)):
        if first.setdefault(real_paths[path], path) != path:
            unread.append(Unread(str(path), "further links to a file"))
    return sorted(first.values())


def _files_below(root: Path, unread: list[Unread]) -> Iterator[Path]:
    """All files below a folder. Linked folders come after all others, so that a folder that is also below `root` keeps
    its own path, and a folder that was already visited is not visited again, which also ends cycles of links."""
    visited: set[Path] = set()
    pending = [root]
    while pending:
        for at, subfolders, names in os.walk(pending.pop(0), onerror=_cannot_list):
            folder = Path(at)
            if folder.resolve() in visited:
                subfolders.clear()
                continue
            visited.add(folder.resolve())
            hidden = sorted(filter(_is_hidden, (*subfolders, *names)))
            unread += (Unread(str(folder / name), HIDDEN) for name in hidden)
            subfolders[:] = sorted(name for name in subfolders if not _is_hidden(name))
            pending += (folder / name for name in subfolders if (folder / name).is_symlink())
            yield from (folder / name for name in names if not _is_hidden(name))


def _cannot_list(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: can't be read: {error.strerror}") from error


def _files_of_glob(pattern: str, unread: list[Unread]) -> Iterator[Path]:
    """The files that match. A file that also matches through a linked folder is yielded once. As in a shell, hidden
    files match only a pattern that has the dot; files that a system added are left out nevertheless."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = Path(*parts[:fixed]).resolve()
    matched = list(_glob(pattern))
    real_folders = {folder: folder.resolve() for folder in {path.parent for path in matched}}
    read_folders = {parent for folder in real_folders.values() for parent in (folder, *folder.parents)}

    def through_link(path: Path) -> bool:
        return real_folders[path.parent] != base.joinpath(*path.parts[fixed:-1])

    seen: set[tuple[Path, str]] = set()
    for path in sorted(matched, key=lambda path: (through_link(path), path)):
        if any(_is_added_by_system(part) for part in path.parts[fixed:]):
            unread.append(Unread(str(path), HIDDEN))
        elif path.is_dir():
            if path.resolve() not in read_folders:
                unread.append(Unread(str(path), "folders matched by a glob"))
        elif (key := (real_folders[path.parent], path.name)) not in seen:
            seen.add(key)
            yield path


def _glob(pattern: str) -> Iterator[Path]:
    """Like glob.glob with "**", which takes forever where linked folders form cycles. May yield a path twice."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    at = parts.index("**")
    for base in _glob(str(Path(*parts[:at]))):
        for folder in _folders_below(base, frozenset()):
            yield from _glob(str(Path(glob.escape(str(folder)), *(parts[at + 1 :] or ("*",)))))


def _folders_below(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """The folder and all folders below it, except hidden ones and links to one of the folders `above`."""
    real = folder.resolve()
    if not folder.is_dir() or real in above:
        return
    yield folder
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        _cannot_list(error)
    for name in names:
        if not name.startswith("."):
            yield from _folders_below(folder / name, above | {real})


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or _is_added_by_system(name)


def _is_added_by_system(name: str) -> bool:
    """AppleDouble files, which a Mac adds to archives, have the suffix of the file that they describe."""
    return name.startswith("._") or name in _SYSTEM_FOLDERS


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


def is_parquet(path: Path) -> bool:
    return lower_suffix(path) == ".parquet"


def is_document_file(path: Path) -> bool:
    return lower_suffix(path) in DOCUMENT_FILES


def is_jsonl(path: Path) -> bool:
    return _uncompressed_name(path).endswith(".jsonl")


def is_json(path: Path) -> bool:
    return _uncompressed_name(path).endswith(".json")


def lower_suffix(path: Path) -> str:
    """The last suffix in lower case, such as ".gz"."""
    return path.suffix.lower()


def _uncompressed_name(path: Path) -> str:
    """The file's name in lower case, without .gz or .zst."""
    return path.name.lower().removesuffix(".gz").removesuffix(".zst")


def _is_line_based(path: Path, data: DataConfig) -> bool:
    suffix = lower_suffix(path)
    return suffix == ".jsonl" or (suffix in (".txt", ".md") and data.documents == "lines")
