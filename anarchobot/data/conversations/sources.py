"""Where rows for tuning come from: JSONL and JSON arrays, packed or not, Parquet, the hub by name; all their fields."""

from collections.abc import Iterator
from pathlib import Path

import orjson

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import compressed, files, hub, parquet, rows
from anarchobot.data.sources.rows import Row
from anarchobot.data.sources.spans import Span

JSON = (".json", ".json.gz", ".json.zst")
Raw = Iterator[tuple[str, bytes | Row | ValueError]]  # where it is, and a line, a row or what is wrong with it


def open_files(data: DataConfig) -> Iterator[tuple[str, Raw]]:
    """(name, rows) of each file of `data.dataset`, one after the other. Files are what `files.find` finds, and JSON.

    A hub dataset is not shuffled while it streams: all of it is held and shuffled in training. Raises UserError for a
    name that nothing lies under and a file that can't be read.
    """
    if data.dataset is None:
        raise UserError("data.dataset is not set: name JSONL, JSON or Parquet files, or a Hugging Face dataset")
    for name in [data.dataset] if isinstance(data.dataset, str) else data.dataset:
        if hub.looks_like_a_name(name) and not name.endswith(JSON):
            unshuffled = data.model_copy(update={"shuffle_buffer": 0})
            found = enumerate(hub.rows(name, unshuffled, seed=0, replaceable=False))
            yield name, ((f"{name}: row {i}", row) for i, row in found)
            continue
        for path in [Path(name)] if name.endswith(JSON) and Path(name).is_file() else files.find([name]):
            yield str(path), _file(path)


def _file(path: Path) -> Raw:
    try:
        if path.suffix == ".parquet":
            yield from parquet.whole_rows(path)
        elif path.name.endswith(JSON) and _is_array(path):
            yield from _array(path)
        elif path.name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json")):
            yield from rows.jsonl(Span(path))
        else:
            raise UserError(f"{path}: text without turns: expected a .jsonl, .json or .parquet file of conversations")
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    except ImportError as error:
        raise UserError(f"{path}: to read .zst files: pip install backports.zstd") from error


def _is_array(path: Path) -> bool:
    """Many files called .json are JSONL."""
    with compressed.Unpacked(path) as file:
        return file.read(64).removeprefix(rows.BOM).lstrip().startswith(b"[")


def _array(path: Path) -> Raw:
    """One JSON array of all rows, as Alpaca and ShareGPT come; held as a whole."""
    try:
        items = orjson.loads(compressed.whole(path).removeprefix(rows.BOM))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg} (character {error.pos + 1})") from error
    except ValueError as error:  # it breaks off
        raise UserError(f"{path}: {error}") from error
    if not items:
        raise UserError(f"{path}: the file is empty")
    for i, item in enumerate(items):
        yield f"{path}: row {i}", item if isinstance(item, dict) else ValueError("not a JSON object")
