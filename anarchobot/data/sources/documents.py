"""Sources to documents, one at a time and in bounded memory, with a count of everything that was left out."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import builtin, files, hub, parquet, rows, text_files
from anarchobot.data.sources.file_ranges import FileRange

# A text file of at least this many characters gives its tail to validation; a smaller one goes whole to one side.
SPLIT_FILE_CHARS = 65536


class Document(NamedTuple):
    """One text. `splittable`: a long file, of which the tail may go to validation."""

    text: str
    splittable: bool = False


@dataclass
class Used:
    """What a mixture has taken of one source, duplicates included; `bytes` of UTF-8."""

    name: str
    documents: int = 0
    bytes: int = 0


@dataclass
class DocumentCounts:
    """What became of the documents: `read` is the sum of the others. Nothing is dropped without being counted.

    What follows those five is for the summary, and no part of the manifest.
    """

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    filtered: int = 0
    broken: int = 0
    first_broken: str = ""  # where and why
    reasons: Counter[str] = field(default_factory=Counter)  # why the filtered were left out
    empty_files: int = 0
    first_empty: str = ""
    used: list[Used] = field(default_factory=list)  # of a mixture's sources

    def as_manifest(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("read", "kept", "duplicates", "filtered", "broken")}

    def details(self) -> list[str]:
        """Lines for people: why documents were filtered, the first broken one, the shares of a mixture."""
        said = []
        if self.reasons:
            said.append("filtered: " + ", ".join(f"{why} {n:,}" for why, n in sorted(self.reasons.items())))
        if self.first_broken:
            said.append(f"first broken: {self.first_broken}")
        if self.empty_files:
            said.append(f"empty files passed over: {self.empty_files:,} (first: {self.first_empty})")
        total = sum(used.bytes for used in self.used) or 1
        said += [
            f"used of {used.name}: {used.documents:,} documents, {used.bytes / 1e6:,.2f} MB ({used.bytes / total:.1%})"
            for used in self.used
        ]
        return said

    def summary(self) -> str:
        """One line for people: what was left out, and why."""
        said = f"read {self.read}, broken {self.broken}, filtered {self.filtered}, duplicates {self.duplicates}"
        return "; ".join([said, *self.details()])

    def add_filtered(self, why: str) -> None:
        self.filtered += 1
        self.reasons[why] += 1

    def add_broken(self, place: str, error: Exception) -> None:
        self.broken += 1
        self.first_broken = self.first_broken or f"{place}: {error}"


def open_source(
    data: DataConfig, seed: int, counts: DocumentCounts, warn: Callable[[str], None] = lambda text: None
) -> tuple[str, Iterator[Document]]:
    """The documents of the configured dataset, and what they are called.

    Several datasets come one after the other, or mixed by `data.weights`: then bytes follow the weights at any time
    (before duplicates are dropped), and the documents end with the first dataset that runs out. The name in front is
    the datasets', or `"builtin"` where `data.fallback` allows it and one can't be reached, of which `warn` is told.
    Raises UserError when there is no dataset or it can't be reached.
    """
    if data.dataset is None:
        raise UserError(
            "data.dataset is not set: name files, a Hugging Face dataset or 'builtin', or give --input FILE"
        )
    names = [data.dataset] if isinstance(data.dataset, str) else data.dataset
    try:
        sources = [_open(name, data, seed, counts) for name in names]
    except UserError as error:
        if data.fallback == "builtin":
            warn(f"{error}: going on with the built-in text instead (data.fallback: builtin)")
            return "builtin", _open("builtin", data, seed, counts)
        raise
    if data.weights is None:
        return ", ".join(names), chain.from_iterable(sources)
    return ", ".join(names), _mixed(names, sources, data.weights, counts)


def _open(name: str, data: DataConfig, seed: int, counts: DocumentCounts) -> Iterator[Document]:
    if name == "builtin":
        return _from_texts((("builtin", text) for text in builtin.texts()), data, counts, splittable=True)
    if hub.is_hub_name(name):
        found = enumerate(hub.rows(name, data, seed))
        return _from_rows(((f"{name}: row {i}", row) for i, row in found), data, counts)
    return from_files([name], data, counts)


def _mixed(
    names: list[str], sources: list[Iterator[Document]], weights: list[float], counts: DocumentCounts
) -> Iterator[Document]:
    counts.used = [Used(name) for name in names]
    for i, size, document in mix(sources, weights, lambda document: len(document.text.encode())):
        counts.used[i].documents += 1
        counts.used[i].bytes += size
        yield document


def from_files(names: Iterable[str], data: DataConfig, counts: DocumentCounts) -> Iterator[Document]:
    """The documents of files, folders and globs, in the order given, folders and globs sorted by name.

    What a document is in a text file, `data.documents` says; a JSONL or Parquet file holds one a row. Names are looked
    up at once: one that matches nothing raises UserError here, not when the first document is asked for.
    """
    names = list(names)
    return from_ranges([FileRange(path) for path in files.find(names)], names, data, counts)


def from_ranges(spans: Iterable[FileRange], names: Iterable[str], data: DataConfig, counts: DocumentCounts) -> Iterator[Document]:
    """The same of parts of files; `names` are those that the files were found by."""
    named = {Path(name) for name in names}
    return (document for span in spans for document in _from_file(span, data, counts, span.path in named))


def _from_file(span: FileRange, data: DataConfig, counts: DocumentCounts, is_named: bool) -> Iterator[Document]:
    """An empty file is an error where it was named itself; of a folder or glob it is passed over, and counted."""
    path = span.path
    try:
        if path.suffix == ".parquet":
            yield from _from_rows(parquet.read_text_rows(path, data), data, counts)
        elif path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
            yield from _from_rows(rows.read_jsonl(span), data, counts, any_good=span.start > 0)
        else:
            splittable = data.documents == "file"
            yield from _from_texts(text_files.read_texts(span, data), data, counts, splittable)
    except files.EmptyFile:
        if is_named:
            raise
        counts.empty_files += 1
        counts.first_empty = counts.first_empty or str(path)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def _from_texts(
    texts: Iterable[tuple[str, str | ValueError]], data: DataConfig, counts: DocumentCounts, splittable: bool
) -> Iterator[Document]:
    for place, text in texts:
        counts.read += 1
        if isinstance(text, ValueError):
            counts.add_broken(place, text)
        elif document := _if_good(text, data, counts, splittable):
            yield document


def _from_rows(
    found: Iterable[tuple[str, bytes | rows.Row | ValueError]],
    data: DataConfig,
    counts: DocumentCounts,
    any_good: bool = False,
) -> Iterator[Document]:
    """Rows, each with its place, to documents. A broken row is counted and skipped, but as long as none was good, a
    missing field is most likely a wrong name in the config: UserError."""
    for place, content in found:
        counts.read += 1
        try:
            if isinstance(content, ValueError):
                raise content
            row = rows.parse(content) if isinstance(content, bytes) else content
            if not any_good:
                rows.check_fields(row, place, data)
            text, is_below_min_score = rows.get_text(row, data), rows.is_below_min_score(row, data)
            if row is content:
                rows.check_encodable(text, data)
        except ValueError as error:
            counts.add_broken(place, error)
            continue
        any_good = True
        if is_below_min_score:
            counts.add_filtered("low score")
        elif document := _if_good(text, data, counts, splittable=False):
            yield document


def _if_good(text: str, data: DataConfig, counts: DocumentCounts, splittable: bool) -> Document | None:
    if data.clean:
        text = clean(text)
    if why := why_left_out(text, data):
        counts.add_filtered(why)
        return None
    return Document(text, splittable and len(text) >= SPLIT_FILE_CHARS)


Item = TypeVar("Item")


def mix(
    sources: Sequence[Iterator[Item]], weights: Sequence[float], size: Callable[[Item], int]
) -> Iterator[tuple[int, int, Item]]:
    """(index of its source, its size, item), always from the source that lags furthest behind its share; the first of
    several. No chance is in it. It ends with the first source to run out.

    With w_i the weights divided by their sum and b_i what source i has given, source i lags by w_i * sum(b) - b_i. Of
    two sources, each is never further from its share than the largest item. An item is taken only to be given out.
    """
    given = [0] * len(sources)
    total = sum(weights)
    while True:
        behind = [weight * sum(given) / total - b for weight, b in zip(weights, given, strict=True)]
        i = behind.index(max(behind))
        try:
            item = next(sources[i])
        except StopIteration:
            return
        taken = size(item)
        given[i] += taken
        yield i, taken, item


# Unicode's category Cc: those that end a line become line feeds, the others but tab go.
_LINE_ENDS = re.compile(r"\r\n|[\r\x0b\x0c\x85]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]+")


def clean(text: str) -> str:
    """Line ends to LF (CRLF, CR, form feed, vertical tab, NEL), other control characters but tab taken out, white space
    at line ends stripped.

    Nothing else is touched, so no character is normalised. Cleaning twice changes nothing more.
    """
    text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return "\n".join([line.rstrip() for line in text.split("\n")])


def why_left_out(text: str, data: DataConfig) -> str:
    """`blank`, `too short` or `too long`, in characters (code points); empty for a text that is kept."""
    if not text or text.isspace():
        return "blank"
    if len(text) < data.min_chars:
        return "too short"
    if data.max_chars is not None and len(text) > data.max_chars:
        return "too long"
    return ""
