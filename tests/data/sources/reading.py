"""Shared by the tests of the readers: read texts and counts from files, and write files."""

import json
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources.documents import DocumentCounts, from_files

TEXT = DataConfig()


def read(*names: Path | str, data: DataConfig = TEXT) -> tuple[list[str], DocumentCounts]:
    """Returns the distinct texts and the counts, with duplicates counted as pretokenize does."""
    counts = DocumentCounts()
    texts: dict[str, None] = {}
    for document in from_files(map(str, names), data, counts):
        counts.duplicates += document.text in texts
        texts[document.text] = None
    counts.kept = len(texts)
    assert counts.read == counts.kept + counts.duplicates + counts.filtered + counts.broken
    assert counts.filtered == counts.reasons.total()
    return list(texts), counts


def problem(*names: Path | str, data: DataConfig = TEXT) -> str:
    with pytest.raises(UserError) as error:
        read(*names, data=data)
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(path: Path, *lines: object) -> Path:
    """Writes strings and bytes as they are, anything else as JSON."""
    raw = (x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines)
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path
