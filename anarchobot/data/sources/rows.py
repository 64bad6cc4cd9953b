"""Rows with fields, from JSONL, Parquet or the Hub, to texts. Problems with a single row are ValueErrors."""

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import compressed
from anarchobot.data.sources.files import EmptyFile, FileRange

Row = dict[str, Any]
BOM = b"\xef\xbb\xbf"
_CONVERSATIONS = {"messages", "conversations"}  # fields of rows for fine-tuning


def read_jsonl(file_range: FileRange) -> Iterator[tuple[str, bytes | ValueError]]:
    """Yields (location, line) for each line that isn't blank. Raises EmptyFile when a whole file has none."""
    empty, name = True, file_range.name
    for number, line in compressed.read_lines(file_range):
        if isinstance(line, ValueError) or not line.isspace():
            empty = False
            yield f"{name}:{number}", line
    if empty and file_range == FileRange(file_range.path):
        raise EmptyFile(f"{file_range.path}: the file is empty")


def parse(line: bytes) -> Row:
    """Raises ValueError when the line is not a JSON object."""
    try:
        row = orjson.loads(line.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as decode_error:
            raise ValueError(f"not UTF-8 (byte {decode_error.start + 1} of the line)") from error
        raise ValueError(f"not valid JSON: {error.msg} (character {error.pos + 1})") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def check_fields(fields: Iterable[str], location: str, data: DataConfig) -> None:
    """Raises UserError when a field that the config names is missing."""
    fields = sorted(fields)
    found = f"(it has {', '.join(fields) or 'none'})"
    if data.text_field not in fields and _CONVERSATIONS & {*fields}:
        raise UserError(
            f"{location}: no field '{data.text_field}' {found}: conversations are read by train --chat and sft "
            "--dataset; for a field of text, set data.text_field"
        )
    for key, field in (("text_field", data.text_field), ("score_field", data.score_field)):
        if field is not None and field not in fields:
            raise UserError(f"{location}: no field '{field}' {found}: set data.{key}")


def get_text(row: Row, data: DataConfig) -> str:
    """Decodes bytes, from a Parquet column that is not marked as text. Raises ValueError when there is no text."""
    text = row.get(data.text_field)
    if isinstance(text, bytes):
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"'{data.text_field}' has bytes that aren't UTF-8 (byte {error.start + 1})") from error
    if text is None and data.text_field in row:
        raise ValueError(f"'{data.text_field}' is null")
    if not isinstance(text, str):
        raise ValueError(f"no text in '{data.text_field}'")
    return text


def check_encodable(text: str, data: DataConfig) -> None:
    """Raises ValueError when the text can't be encoded as UTF-8. `parse` already rejects such text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"unpaired surrogate in '{data.text_field}'") from error


def is_below_min_score(row: Row, data: DataConfig) -> bool:
    """Whether the score is below `data.score_min` or NaN. Raises ValueError when the row has no score."""
    if data.score_field is None or data.score_min is None:
        return False
    score = row.get(data.score_field)
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"no number in '{data.score_field}'")
    return not score >= data.score_min
