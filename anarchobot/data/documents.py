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

# A text file of at least this many bytes gives its tail to validation; a smaller one goes whole to one side.
CUT_FILE_BYTES = 65536


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
            rows = hub.rows(names[0], data, seed)
            return names[0], _rows(((names[0], row) for row in rows), data, counts)
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
        found = sorted(Path(p) for p in glob.glob(name, recursive=True) if p.endswith(SUFFIXES))
        if found:
            return found
        raise UserError(f"{name}: matches no {', '.join(SUFFIXES)} file")
    near = did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise UserError(f"{name}: no such file or folder{near}")


def _from_file(path: Path, data: DataConfig, counts: Counts) -> Iterator[Document]:
    try:
        if path.suffix == ".jsonl":
            yield from _rows(_jsonl_rows(path), data, counts)
        else:
            yield from _texts([_decode(path, path.read_bytes())], counts)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def _decode(path: Path, raw: bytes) -> str:
    if not raw:
        raise UserError(f"{path}: the file is empty")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 text (byte {error.start}): convert it first, as with iconv -f latin1 -t utf-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{path}: not text: it holds a NUL character (at {text.index(chr(0))})")
    return text


def _texts(texts: Iterable[str], counts: Counts) -> Iterator[Document]:
    for text in texts:
        counts.read += 1
        if text:
            yield Document(text, may_cut=len(text) >= CUT_FILE_BYTES)
        else:
            counts.filtered += 1


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """(place, object) for each line of a JSONL file, split at byte 0x0A only; (place, what is wrong) for a bad line."""
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                empty = False
                yield f"{path}:{number}", _parse_line(line, first=number == 1)
    if empty:
        raise UserError(f"{path}: the file is empty")


def _parse_line(line: bytes, first: bool) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error.msg}"
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        return f"not usable JSON: {error}"
    return row if isinstance(row, dict) else "not a JSON object"


def _rows(rows: Iterable[tuple[str, dict[str, Any] | str]], data: DataConfig, counts: Counts) -> Iterator[Document]:
    good = 0
    for place, row in rows:
        counts.read += 1
        problem = row if isinstance(row, str) else _problem(row, data)
        if problem or isinstance(row, str):
            if isinstance(row, dict) and data.text_field not in row and not good:  # most likely a wrong name
                has = ", ".join(sorted(row)) or "nothing"
                raise UserError(f"{place}: no field '{data.text_field}' (it has {has}): set data.text_field")
            counts.broken += 1
            counts.first_broken = counts.first_broken or f"{place}: {problem}"
            continue
        good += 1
        if row[data.text_field] and _scores(row, place, data):
            yield Document(row[data.text_field])
        else:
            counts.filtered += 1


def _problem(row: dict[str, Any], data: DataConfig) -> str:
    text = row.get(data.text_field)
    if not isinstance(text, str):
        return f"no text in '{data.text_field}'"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return ""


def _scores(row: dict[str, Any], place: str, data: DataConfig) -> bool:
    if data.score_field is None or data.score_min is None:
        return True
    score = row.get(data.score_field)
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise UserError(f"{place}: '{data.score_field}' is {score!r}, not a number: see data.score_field")
    return score >= data.score_min
