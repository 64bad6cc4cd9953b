"""Rows with fields, from JSONL, Parquet or the hub, to texts; what is wrong with a row is said by a ValueError."""

from collections.abc import Iterable, Iterator
from typing import Any

import orjson

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import compressed
from anarchobot.data.sources.file_ranges import FileRange
from anarchobot.data.sources.files import EmptyFile

Row = dict[str, Any]
BOM = b"\xef\xbb\xbf"


def read_jsonl(span: FileRange) -> Iterator[tuple[str, bytes | ValueError]]:
    """(place, line) for each line of a JSONL file that isn't blank. Raises EmptyFile when a whole file has none."""
    empty, name = True, span.name
    for number, line in compressed.read_lines(*span):
        if isinstance(line, ValueError) or not line.isspace():
            empty = False
            yield f"{name}:{number}", line
    if empty and span == FileRange(span.path):
        raise EmptyFile(f"{span.path}: the file is empty")


def parse(line: bytes) -> Row:
    """Raises ValueError when it is no JSON object."""
    try:
        row = orjson.loads(line.removeprefix(BOM))
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as no_text:
            raise ValueError(f"not UTF-8 (byte {no_text.start + 1} of the line)") from error
        raise ValueError(f"not valid JSON: {error.msg} (character {error.pos + 1})") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def check_fields(has: Iterable[str], place: str, data: DataConfig) -> None:
    """Raises UserError when a field that the config names is not among those that there are."""
    has = sorted(has)
    for key, field in (("text_field", data.text_field), ("score_field", data.score_field)):
        if field is not None and field not in has:
            raise UserError(f"{place}: no field '{field}' (it has {', '.join(has) or 'nothing'}): set data.{key}")


def get_text(row: Row, data: DataConfig) -> str:
    """The text of a row. Raises ValueError when it has none."""
    text = row.get(data.text_field)
    if not isinstance(text, str):
        raise ValueError(f"no text in '{data.text_field}'")
    return text


def check_encodable(text: str, data: DataConfig) -> None:
    """Raises ValueError when the text can't be written as UTF-8; `parse` lets no such text through."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair in '{data.text_field}'") from error


def is_below_min_score(row: Row, data: DataConfig) -> bool:
    """Whether the row's score is below `data.score_min`, or not a number. Raises ValueError when it has no score."""
    if data.score_field is None or data.score_min is None:
        return False
    score = row.get(data.score_field)
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"no number in '{data.score_field}'")
    return not score >= data.score_min
