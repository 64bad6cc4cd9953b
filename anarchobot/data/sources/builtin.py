"""Text that every machine has: the running Python's documentation topics and its standard library's source.

About 10 MB. It serves the quickstart, the tests, and, where a config allows it, a dataset that can't be reached.
"""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "pydoc_data"}


def texts() -> Iterator[str]:
    """The topics by name, then the source files by path; what can't be read as UTF-8 is no library text."""
    yield from topics()
    for path in source_files():
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def topics() -> list[str]:
    """The language reference's topics, as `help("with")` shows them."""
    from pydoc_data.topics import topics as by_name

    return [by_name[name] for name in sorted(by_name)]


def source_files() -> list[Path]:
    """The standard library's Python files, sorted, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(p for p in root.rglob("*.py") if not _NOT_LIBRARY.intersection(p.relative_to(root).parts))
