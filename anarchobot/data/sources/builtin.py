"""Text available on every machine: the running Python's documentation topics and standard library source.

About 10 MB, used by the quickstart, the tests and `data.fallback: builtin`.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}


def texts() -> Iterator[str]:
    """The topics by name, then the source files by path, without those that can't be read as UTF-8."""
    yield from topics()
    for path in source_files():
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def topics() -> list[str]:
    """The topics of the language reference, as shown by `help("with")`."""
    from pydoc_data.topics import topics as by_name

    return [by_name[name] for name in sorted(by_name)]


def source_files() -> list[Path]:
    """The standard library's Python files, sorted, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not _EXCLUDED.intersection(p.relative_to(root).parts))
