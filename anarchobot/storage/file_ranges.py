"""Checks where a file's own header says that its parts are, before any memory is allocated for them."""

from collections.abc import Iterable
from typing import NamedTuple


class Part(NamedTuple):
    """Bytes [start, end) of a file, as its header states them."""

    name: str
    start: int
    end: int


def check_parts(parts: Iterable[Part], size: int) -> None:
    """Raises ValueError if a part lies beyond the `size` bytes of the file, or two overlap: without overlaps, all parts
    together are no larger than the file."""
    last = Part("", 0, 0)
    for part in sorted(parts, key=lambda part: (part.start, part.end)):
        if part.end > size:
            raise ValueError(f"truncated: {size:,} bytes, but {part.name} ends at byte {part.end:,}")
        if part.start < last.end:
            raise ValueError(
                f"{part.name} overlaps {last.name}: it starts at byte {part.start:,}, before byte {last.end:,}"
            )
        last = part
