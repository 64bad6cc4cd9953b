"""Reads Parquet files in batches of rows. pyarrow comes with the extra `hub`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources.compressed import most_bytes, too_large
from anarchobot.data.sources.files import EmptyFile
from anarchobot.data.sources.rows import Row, check_fields

BATCH_ROWS = 128


def read_text_rows(path: Path, data: DataConfig) -> Iterator[tuple[str, Row | ValueError]]:
    """`read_rows` with the text and score columns only. Raises UserError when one is missing."""

    def select(names: list[str]) -> list[str]:
        check_fields(names, str(path), data)
        return list(dict.fromkeys(filter(None, (data.text_field, data.score_field))))

    return read_rows(path, select)


def read_rows(path: Path, select: Callable[[list[str]], list[str]] = list) -> Iterator[tuple[str, Row | ValueError]]:
    """Yields (location, row), counting rows from 0, with the columns that `select` picks from all column names. A row
    with text that isn't UTF-8 is replaced by a ValueError.

    Memory: the selected columns of one row group, compressed, and BATCH_ROWS decompressed rows. Raises EmptyFile;
    UserError when the file is damaged or expands too much; OSError when it can't be read.
    """
    import pyarrow as arrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with path.open("rb") as raw, ParquetFile(raw) as file:
            columns = select(file.schema_arrow.names)
            _check_expansion(path, file.metadata)
            for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
                for values in zip(*(batch.column(name) for name in columns), strict=True):
                    yield f"{path}: row {number}", _row(columns, values)
                    number += 1
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's own OSErrors have no errno
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: damaged or not a Parquet file (row {number}: {reason}): download it again") from error
    if not number:
        raise EmptyFile(f"{path}: the file is empty")


def _check_expansion(path: Path, metadata: Any) -> None:
    """Raises UserError if a row group states that it expands to far more than the size of the file.

    The sizes of its columns are not looked at: pyarrow 26 ends the process if the statistics of one are damaged.
    """
    most = most_bytes(path)
    for number in range(metadata.num_row_groups):
        if metadata.row_group(number).total_byte_size > most:
            raise UserError(f"{path}: row group {number} {too_large(path, most)}")


def _row(columns: list[str], values: tuple[Any, ...]) -> Row | ValueError:
    try:
        return {name: value.as_py() for name, value in zip(columns, values, strict=True)}
    except UnicodeDecodeError as error:
        return ValueError(f"not UTF-8 (byte {error.start + 1} of the text)")
