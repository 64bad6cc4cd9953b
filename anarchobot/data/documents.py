"""Text files and JSONL to documents, one at a time, with a count of everything that was left out."""

import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anarchobot.config.errors import UserError, did_you_mean
from anarchobot.config.schema import DataConfig
from anarchobot.data import builtin, hub

SUFFIXES = (".txt", ".md", ".jsonl")

# A text file of at least this many characters gives its tail to validation; a smaller one goes whole to one side.
CUT_FILE_CHARS = 65536

Row = dict[str, Any]


@dataclass(frozen=True)
class Document:
    """One text. `may_cut`: a long file, of which the tail may go to validation."""

    text: str
    may_cut: bool = False


@dataclass
class Counts:
    """What became of the documents: `read` is the sum of the others. Nothing is dropped without being counted."""

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    filtered: int = 0
    broken: int = 0
    first_broken: str = ""  # where and why, for the summary; not part of the manifest

    def as_manifest(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("read", "kept", "duplicates", "filtered", "broken")}


def open_source(data: DataConfig, seed: int, counts: Counts) -> tuple[str, Iterator[Document]]:
    """The documents of the configured dataset, and what they are called.

    The name in front of them is the dataset's, or `"builtin"` where `data.fallback` allows it and the dataset can't be
    reached; the caller says so to the person. Raises UserError when there is no dataset or it can't be reached.
    """
    dataset = data.dataset
    if dataset is None:
        raise UserError(
            "data.dataset is not set: name files, a Hugging Face dataset or 'builtin', or give --input FILE"
        )
    if dataset == "builtin":
        return "builtin", _texts(builtin.texts(), counts)
    names = [dataset] if isinstance(dataset, str) else dataset
    try:
        if len(names) == 1 and hub.looks_like_a_name(names[0]):
            rows = enumerate(hub.rows(names[0], data, seed))
            return names[0], _rows(((f"{names[0]}: row {i}", row) for i, row in rows), data, counts)
        return ", ".join(names), from_files(names, data, counts)
    except UserError:
        if data.fallback == "builtin":
            return "builtin", _texts(builtin.texts(), counts)
        raise


def from_files(names: Iterable[str], data: DataConfig, counts: Counts) -> Iterator[Document]:
    """The documents of files, folders and globs, in the order given, folders and globs sorted by name.

    A text file is one document; a JSONL file holds one a line. Names are looked up at once: a name that matches nothing
    raises UserError here, not when the first document is asked for.
    """
    paths = [path for name in names for path in _matches(name)]
    return (document for path in paths for document in _from_file(path, data, counts))


def _matches(name: str) -> list[Path]:
    path = Path(name)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"{name}: no {', '.join(SUFFIXES)} file in this folder")
        return found
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f"{name}: expected a {', '.join(SUFFIXES)} file: rename it, or convert it to one of these")
        return [path]
    if glob.has_magic(name):
        found = sorted(p for p in map(Path, glob.glob(name, recursive=True)) if p.suffix in SUFFIXES and p.is_file())
        if found:
            return found
        raise UserError(f"{name}: matches no {', '.join(SUFFIXES)} file")
    near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UserError(f"{name}: no such file or folder{near}")


def _from_file(path: Path, data: DataConfig, counts: Counts) -> Iterator[Document]:
    try:
        if path.suffix == ".jsonl":
            yield from _rows(_jsonl_lines(path), data, counts)
        else:
            yield from _texts([_decode(path, path.read_bytes())], counts)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def _decode(path: Path, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin1"  # latin1: only an example
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start + 1}): convert it first, as with iconv -f {encoding} -t utf-8"
        ) from error
    if not text:
        raise UserError(f"{path}: the file is empty")
    if "\0" in text:
        raise UserError(f"{path}: not text: it holds a NUL character (at character {text.index(chr(0)) + 1})")
    return text


def _texts(texts: Iterable[str], counts: Counts) -> Iterator[Document]:
    for text in texts:
        counts.read += 1
        if not _is_blank(text):
            yield Document(text, may_cut=len(text) >= CUT_FILE_CHARS)
        else:
            counts.filtered += 1


def _jsonl_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) for each line of a JSONL file that isn't blank. Lines end at byte 0x0A only."""
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                empty = False
                yield f"{path}:{number}", line
    if empty:
        raise UserError(f"{path}: the file is empty")


def _rows(rows: Iterable[tuple[str, bytes | Row]], data: DataConfig, counts: Counts) -> Iterator[Document]:
    """Rows, each with its place, to documents. A broken row is counted and skipped, but as long as none was good, a
    missing field is most likely a wrong name in the config: UserError."""
    any_good = False
    for place, line in rows:
        counts.read += 1
        try:
            row = _parse(line) if isinstance(line, bytes) else line
            if not any_good:
                _check_fields(row, place, data)
            text, wanted = _text(row, data), _scores(row, data)
        except (ValueError, RecursionError) as error:
            counts.broken += 1
            counts.first_broken = counts.first_broken or f"{place}: {error}"
            continue
        any_good = True
        if wanted and not _is_blank(text):
            yield Document(text)
        else:
            counts.filtered += 1


def _parse(line: bytes) -> Row:
    """Raises ValueError, or RecursionError when it is nested too deep."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (character {error.pos + 1})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    return row


def _check_fields(row: Row, place: str, data: DataConfig) -> None:
    for key, field in (("text_field", data.text_field), ("score_field", data.score_field)):
        if field is not None and field not in row:
            has = ", ".join(sorted(row)) or "nothing"
            raise UserError(f"{place}: no field '{field}' (it has {has}): set data.{key}")


def _text(row: Row, data: DataConfig) -> str:
    text = row.get(data.text_field)
    if not isinstance(text, str):
        raise ValueError(f"no text in '{data.text_field}'")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair in '{data.text_field}'") from error
    return text


def _scores(row: Row, data: DataConfig) -> bool:
    """Whether the row's score is high enough."""
    if data.score_field is None or data.score_min is None:
        return True
    score = row.get(data.score_field)
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"no number in '{data.score_field}'")
    return score >= data.score_min


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
