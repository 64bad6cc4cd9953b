"""Text files to documents: the whole file, its paragraphs or its lines; the last two streamed line by line."""

from collections.abc import Iterator
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import compressed
from anarchobot.data.sources.file_ranges import FileRange
from anarchobot.data.sources.files import EmptyFile
from anarchobot.data.sources.rows import BOM


def read_texts(span: FileRange, data: DataConfig) -> Iterator[tuple[str, str | ValueError]]:
    """(place, text) of each document of a UTF-8 file, without its byte order mark and otherwise unchanged.

    Lines and paragraphs come without the line end behind them; blank lines (ASCII white space) are no documents. In
    place of a broken document stands the ValueError that says why. Raises EmptyFile, and UserError when the file,
    judged by its first document, is no UTF-8 text at all; OSError when it can't be read.
    """
    path = span.path
    first = span.start == 0
    empty = span == FileRange(path)
    for place, raw in _units(span, data):
        empty = False
        text: str | ValueError
        try:
            text = raw if isinstance(raw, ValueError) else _decode(raw.removeprefix(BOM) if first else raw, data)
        except ValueError as error:
            if first:
                raise UserError(f"{path}: {error}") from error
            text = error
        first = False
        yield place, text
    if empty:
        raise EmptyFile(f"{path}: the file is empty")


def _units(span: FileRange, data: DataConfig) -> Iterator[tuple[str, bytes | ValueError]]:
    if data.documents == "file":
        return _file(span.path)
    return _lines(span) if data.documents == "lines" else _paragraphs(span.path)


def _file(path: Path) -> Iterator[tuple[str, bytes | ValueError]]:
    try:
        raw: bytes | ValueError = compressed.read_all(path)
    except ValueError as error:
        raw = error
    if raw not in (b"", BOM):
        yield str(path), raw


def _lines(span: FileRange) -> Iterator[tuple[str, bytes | ValueError]]:
    name = span.name
    for number, line in compressed.read_lines(*span):
        if isinstance(line, ValueError):
            yield f"{name}:{number}", line
        elif not _is_blank(line):
            yield f"{name}:{number}", _without_end(line)


def _paragraphs(path: Path) -> Iterator[tuple[str, bytes | ValueError]]:
    gathered: list[bytes] = []
    start = 0
    for number, line in compressed.read_lines(path):
        if isinstance(line, ValueError):  # the paragraph that it has cut is lost with it
            yield f"{path}:{number}", line
            return
        if _is_blank(line):
            if gathered:
                yield f"{path}:{start}", _without_end(b"".join(gathered))
                gathered = []
        else:
            start = start if gathered else number
            gathered.append(line)
    if gathered:
        yield f"{path}:{start}", _without_end(b"".join(gathered))


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(BOM).strip()


def _without_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def _decode(raw: bytes, data: DataConfig) -> str:
    """Raises ValueError when it is no UTF-8, or holds a NUL, which text has only where something else was meant."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"  # latin1: only an example
        raise ValueError(
            f"not UTF-8 text (byte {error.start + 1}): convert it first, as with iconv -f {encoding} -t utf-8"
        ) from error
    if "\0" in text and not data.clean:
        raise ValueError(
            f"not text: it holds a NUL character (at character {text.index(chr(0)) + 1}); data.clean: true takes such "
            "characters out"
        )
    return text
