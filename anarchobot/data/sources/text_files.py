"""Text files to documents: whole files, paragraphs or lines; the last two are streamed line by line."""

from collections.abc import Iterator
from pathlib import Path

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import compressed
from anarchobot.data.sources.files import EmptyFile, FileRange, UnreadableFile
from anarchobot.data.sources.rows import BOM

NOT_TEXT = "files that are not UTF-8 text (convert them first, for example with iconv -f latin1 -t utf-8)"
UTF_16 = "files that are UTF-16 text (convert them first: iconv -f utf-16 -t utf-8)"
UTF_16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def read_texts(file_range: FileRange, data: DataConfig) -> Iterator[tuple[str, str | ValueError]]:
    """Yields (location, text) for each document of a UTF-8 file, unchanged except for the byte order mark.

    Lines and paragraphs come without their final line end; blank lines (ASCII whitespace) separate or are skipped. A
    broken document is replaced by a ValueError that says why. Raises EmptyFile; when the first document shows that the
    file is not UTF-8 text, UnreadableFile, or UserError if lines are documents: other parts of the file may be read by
    other processes. OSError when it can't be read.
    """
    path = file_range.path
    first = file_range.start == 0
    empty = file_range == FileRange(path)
    for location, raw in _raw_documents(file_range, data):
        empty = False
        text: str | ValueError
        try:
            text = raw if isinstance(raw, ValueError) else _decode(raw.removeprefix(BOM) if first else raw, data)
        except ValueError as error:
            if first and data.documents == "lines":
                raise UserError(f"{path}: {error}") from error
            if first:
                is_utf_16 = isinstance(raw, bytes) and raw.startswith(UTF_16_BOMS)
                raise UnreadableFile(path, UTF_16 if is_utf_16 else NOT_TEXT, str(error)) from error
            text = error
        first = False
        yield location, text
    if empty:
        raise EmptyFile(f"{path}: the file is empty")


def _raw_documents(file_range: FileRange, data: DataConfig) -> Iterator[tuple[str, bytes | ValueError]]:
    if data.documents == "file":
        return _whole_file(file_range.path)
    return _lines(file_range) if data.documents == "lines" else _paragraphs(file_range.path)


def _whole_file(path: Path) -> Iterator[tuple[str, bytes | ValueError]]:
    try:
        raw: bytes | ValueError = compressed.read_all(path)
    except ValueError as error:
        raw = error
    if raw not in (b"", BOM):
        yield str(path), raw


def _lines(file_range: FileRange) -> Iterator[tuple[str, bytes | ValueError]]:
    name = file_range.name
    for number, line in compressed.read_lines(file_range):
        if isinstance(line, ValueError):
            yield f"{name}:{number}", line
        elif not _is_blank(line):
            yield f"{name}:{number}", _strip_line_end(line)


def _paragraphs(path: Path) -> Iterator[tuple[str, bytes | ValueError]]:
    lines: list[bytes] = []
    start = 0
    for number, line in compressed.read_lines(FileRange(path)):
        if isinstance(line, ValueError):  # the incomplete paragraph is dropped with it
            yield f"{path}:{number}", line
            return
        if _is_blank(line):
            if lines:
                yield f"{path}:{start}", _strip_line_end(b"".join(lines))
                lines = []
        else:
            start = start if lines else number
            lines.append(line)
    if lines:
        yield f"{path}:{start}", _strip_line_end(b"".join(lines))


def _is_blank(line: bytes) -> bool:
    return not line.removeprefix(BOM).strip()


def _strip_line_end(raw: bytes) -> bytes:
    return raw.removesuffix(b"\n").removesuffix(b"\r")


def _decode(raw: bytes, data: DataConfig) -> str:
    """Raises ValueError for text that isn't UTF-8 or contains NUL, which indicates another encoding or binary data."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        encoding = "utf-16" if raw.startswith(UTF_16_BOMS) else "latin1"  # latin1 is only an example
        raise ValueError(
            f"not UTF-8 text (byte {error.start + 1}): convert it first, for example with iconv -f {encoding} -t utf-8"
        ) from error
    if "\0" in text and not data.clean:
        raise ValueError(
            f"not text: contains a NUL character (at character {text.index(chr(0)) + 1}): set data.clean: true to "
            "remove control characters"
        )
    return text
