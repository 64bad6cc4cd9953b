"""A file to the texts that go into the base, each with its source: the file, or the file and its row."""

from collections.abc import Iterator
from pathlib import Path

from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import parquet, rows, text_units
from anarchobot.data.sources.documents import Counts
from anarchobot.data.sources.spans import Span

Found = Iterator[tuple[str, str | ValueError]]


def texts(path: Path, data: DataConfig, counts: Counts) -> Iterator[tuple[str, str]]:
    """(source, text) of each text of a file; blank and broken ones are counted and passed over.

    `data.text_field` names the field of JSONL and Parquet rows. Raises UserError for a file that is empty, not text, or
    without that field; OSError when it can't be read.
    """
    for source, text in _found(path, data):
        counts.read += 1
        if isinstance(text, ValueError):
            counts.note_broken(source, text)
        elif not text or text.isspace():
            counts.leave_out("blank")
        else:
            counts.kept += 1
            yield source, text


def _found(path: Path, data: DataConfig) -> Found:
    if path.suffix == ".parquet":
        return _of_rows(parquet.rows(path, data), data)
    if path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
        return _of_rows(rows.jsonl(Span(path)), data)
    return text_units.texts(Span(path), data)


def _of_rows(found: Iterator[tuple[str, bytes | rows.Row | ValueError]], data: DataConfig) -> Found:
    """As long as no row was good, a field that is missing is most likely a wrong name: UserError."""
    any_good = False
    for source, content in found:
        try:
            if isinstance(content, ValueError):
                raise content
            row = rows.parse(content) if isinstance(content, bytes) else content
            if not any_good:
                rows.check_fields(row, source, data)
            text = rows.text_of(row, data)
            rows.check_encodable(text, data)
        except ValueError as error:
            yield source, error
        else:
            any_good = True
            yield source, text
