"""Reads documents from all kinds of sources, streamed and in bounded memory, counting everything that is left out."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import builtin, document_files, files, hub, parquet, rows, text_files
from anarchobot.data.sources.files import FileRange, Unread

Item = TypeVar("Item")
# (location, text) of each document; ValueError: broken, None: its score is below data.score_min.
Texts = Iterable[tuple[str, str | ValueError | None]]

# A text file with at least this many characters contributes its tail to validation; a smaller one goes entirely to one
# split.
SPLIT_FILE_CHARS = 65536

# Unicode category Cc: line terminators become line feeds; all others except tab are removed.
_LINE_ENDS = re.compile(r"\r\n|[\r\x0b\x0c\x85]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x9f]+")

# Around the text of each book: https://www.gutenberg.org/policy/license.html
_GUTENBERG_START, _GUTENBERG_END = (
    re.compile(rf"^\*\*\* ?{word} OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^*]{{0,500}}\*\*\*", re.MULTILINE)
    for word in ("START", "END")
)


class Document(NamedTuple):
    """`splittable`: a long file, whose tail may go to validation."""

    text: str
    splittable: bool = False


@dataclass
class SourceUsage:
    """What a mixture has read from one source, including duplicates; `bytes` of UTF-8."""

    name: str
    documents: int = 0
    bytes: int = 0


@dataclass
class DocumentCounts:
    """Each document read is also counted as exactly one of kept, duplicate, filtered or broken.

    These five counts go into the manifest, the other fields into the summary.
    """

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    filtered: int = 0
    broken: int = 0
    first_broken: str = ""  # location and reason
    reasons: Counter[str] = field(default_factory=Counter)  # why documents were filtered
    gutenberg: int = 0  # books whose header and license were removed
    gutenberg_bytes: int = 0
    empty_files: int = 0
    first_empty: str = ""
    unread: list[Unread] = field(default_factory=list)  # in folders and globs; some are found while reading
    used: list[SourceUsage] = field(default_factory=list)  # of a mixture's sources

    def as_manifest(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("read", "kept", "duplicates", "filtered", "broken")}

    def details(self) -> list[str]:
        """Summary lines: why documents were filtered, the first broken one, the shares of a mixture."""
        lines = []
        if self.reasons:
            lines.append("filtered: " + ", ".join(f"{reason} {n:,}" for reason, n in sorted(self.reasons.items())))
        if self.first_broken:
            lines.append(f"first broken: {self.first_broken}")
        if self.gutenberg:
            removed = f"{self.gutenberg:,} ({self.gutenberg_bytes / 1e3:,.1f} kB)"
            lines.append(f"headers and licenses of Project Gutenberg removed: {removed}")
        if self.empty_files:
            lines.append(f"empty files skipped: {self.empty_files:,} (first: {self.first_empty})")
        lines += files.describe_unread(self.unread)
        total = sum(used.bytes for used in self.used) or 1
        lines += [
            f"from {used.name}: {used.documents:,} documents, {used.bytes / 1e6:,.2f} MB ({used.bytes / total:.1%})"
            for used in self.used
        ]
        return lines

    def summary(self) -> str:
        """What was left out and why, in one line."""
        line = f"read {self.read}, broken {self.broken}, filtered {self.filtered}, duplicates {self.duplicates}"
        return "; ".join([line, *self.details()])

    def add_filtered(self, reason: str) -> None:
        self.filtered += 1
        self.reasons[reason] += 1

    def add_broken(self, location: str, error: Exception) -> None:
        self.broken += 1
        self.first_broken = self.first_broken or f"{location}: {error}"


def open_source(
    data: DataConfig, seed: int, counts: DocumentCounts, warn: Callable[[str], None] = lambda text: None
) -> tuple[str, Iterator[Document]]:
    """Returns the names of the configured datasets, joined, and their documents.

    Several datasets are concatenated, or mixed by `data.weights`: then the bytes follow the weights at all times
    (before deduplication), and the documents end when the first dataset runs out. If a dataset can't be opened and
    `data.fallback` is "builtin", calls `warn` and returns "builtin" instead. Raises UserError when no dataset is set or
    one can't be opened.
    """
    if data.dataset is None:
        raise UserError(
            "data.dataset is not set: name files, a Hugging Face dataset or 'builtin', or give --input FILE"
        )
    names = data.datasets
    try:
        sources = [_open(name, data, seed, counts) for name in names]
    except UserError as error:
        if data.fallback == "builtin":
            warn(f"{error}: using the built-in text instead (data.fallback: builtin)")
            return "builtin", _open("builtin", data, seed, counts)
        raise
    if data.weights is None:
        return ", ".join(names), chain.from_iterable(sources)
    return ", ".join(names), _mixture(names, sources, data.weights, counts)


def total_bytes(names: Sequence[str]) -> int | None:
    """Bytes of all datasets, for progress bars; None if some are compressed or not files."""
    if any(name == "builtin" or hub.is_hub_name(name) for name in names):
        return None
    paths = files.find(names)
    compressed = any(files.lower_suffix(path) in (".gz", ".zst", ".parquet", *files.DOCUMENT_FILES) for path in paths)
    return None if compressed else sum(path.stat().st_size for path in paths)


def _open(name: str, data: DataConfig, seed: int, counts: DocumentCounts) -> Iterator[Document]:
    if name == "builtin":
        return _keep_usable((("builtin", text) for text in builtin.texts()), data, counts, splittable=True)
    if hub.is_hub_name(name):
        numbered = enumerate(hub.rows(name, data, seed))
        return _keep_usable(_row_texts(((f"{name}: row {i}", row) for i, row in numbered), data), data, counts)
    return from_files([name], data, counts)


def from_files(names: Iterable[str], data: DataConfig, counts: DocumentCounts) -> Iterator[Document]:
    """The documents of files, folders and globs, in the order given; folders and globs sorted by name.

    `data.documents` says what a document is in a text file; in JSONL and Parquet files, each row is one. A name that
    matches nothing raises UserError immediately, not when the first document is read. What is not read is counted then
    as well.
    """
    names = list(names)
    return from_ranges([FileRange(path) for path in files.find(names, counts.unread)], names, data, counts)


def from_ranges(
    ranges: Iterable[FileRange], names: Iterable[str], data: DataConfig, counts: DocumentCounts
) -> Iterator[Document]:
    """Like `from_files`, for byte ranges of files that were found by `names`."""
    named = {Path(name) for name in names}
    return (
        document
        for file_range in ranges
        for document in _from_range(file_range, data, counts, file_range.path in named)
    )


def _from_range(file_range: FileRange, data: DataConfig, counts: DocumentCounts, is_named: bool) -> Iterator[Document]:
    """A file that is empty or unreadable is an error if it was named itself; in a folder or glob it is counted."""
    path = file_range.path
    splittable = data.documents == "file" and not (files.is_parquet(path) or files.is_jsonl(path))
    try:
        yield from _keep_usable(read_texts(file_range, data), data, counts, splittable)
    except files.EmptyFile:
        if is_named:
            raise
        counts.empty_files += 1
        counts.first_empty = counts.first_empty or str(path)
    except files.UnreadableFile as error:
        if is_named:
            raise
        counts.unread.append(Unread(str(path), error.kind))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def read_texts(file_range: FileRange, data: DataConfig) -> Texts:
    """Reads a file of any format. Raises EmptyFile, UnreadableFile, UserError for a damaged file or a missing field,
    and OSError."""
    path = file_range.path
    if files.is_parquet(path):
        return _row_texts(parquet.read_text_rows(path, data), data)
    if files.is_jsonl(path):
        return _row_texts(rows.read_jsonl(file_range), data, any_valid=file_range.start > 0)
    if files.is_document_file(path):
        return [(str(path), document_files.read_text(path))]
    return text_files.read_texts(file_range, data)


def _row_texts(
    located_rows: Iterable[tuple[str, bytes | rows.Row | ValueError]], data: DataConfig, any_valid: bool = False
) -> Texts:
    """A missing field before any valid row is most likely a wrong name in the config, so it raises UserError."""
    for location, content in located_rows:
        try:
            if isinstance(content, ValueError):
                raise content
            row = rows.parse(content) if isinstance(content, bytes) else content
            if not any_valid:
                rows.check_fields(row, location, data)
            text, is_below_min_score = rows.get_text(row, data), rows.is_below_min_score(row, data)
            if row is content:
                rows.check_encodable(text, data)
        except ValueError as error:
            yield location, error
        else:
            any_valid = True
            yield location, None if is_below_min_score else text


def _keep_usable(
    texts: Texts, data: DataConfig, counts: DocumentCounts, splittable: bool = False
) -> Iterator[Document]:
    for location, text in texts:
        counts.read += 1
        if isinstance(text, ValueError):
            counts.add_broken(location, text)
        elif text is None:
            counts.add_filtered("low score")
        else:
            text = _remove_gutenberg(clean_text(text), counts) if data.clean else text
            if reason := filter_reason(text, data):
                counts.add_filtered(reason)
            else:
                yield Document(text, splittable and len(text) >= SPLIT_FILE_CHARS)


def clean_text(text: str) -> str:
    """Converts line ends to LF (CRLF, CR, form feed, vertical tab, NEL), removes other control characters except tab,
    and strips whitespace at line ends.

    Nothing else changes; in particular, there is no Unicode normalization. Idempotent.
    """
    text = _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))
    return "\n".join([line.rstrip() for line in text.split("\n")])


def _remove_gutenberg(text: str, counts: DocumentCounts) -> str:
    """Removes the header and the license that Project Gutenberg adds to a book: 19 kB, the same in all of them."""
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    if not (start and end and start.end() < end.start()):
        return text
    body = text[start.end() : end.start()].strip("\n") + "\n"
    counts.gutenberg += 1
    counts.gutenberg_bytes += len(text.encode()) - len(body.encode())
    return body


def filter_reason(text: str, data: DataConfig) -> str:
    """`blank`, `too short` or `too long`, in characters (code points); empty for a text that is kept."""
    if not text or text.isspace():
        return "blank"
    if len(text) < data.min_chars:
        return "too short"
    if data.max_chars is not None and len(text) > data.max_chars:
        return "too long"
    return ""


def _mixture(
    names: list[str], sources: list[Iterator[Document]], weights: list[float], counts: DocumentCounts
) -> Iterator[Document]:
    counts.used = [SourceUsage(name) for name in names]
    for i, size, document in mix_by_weight(sources, weights, lambda document: len(document.text.encode())):
        counts.used[i].documents += 1
        counts.used[i].bytes += size
        yield document


def mix_by_weight(
    sources: Sequence[Iterator[Item]], weights: Sequence[float], size: Callable[[Item], int]
) -> Iterator[tuple[int, int, Item]]:
    """Yields (source index, size, item), always from the source furthest behind its share, until one runs out.

    With weights w_i normalized to sum to 1 and b_i the total size taken from source i, source i is behind by
    w_i * sum(b) - b_i; ties go to the first source. Deterministic. With two sources, neither is ever further from its
    share than the largest item. No item is read ahead.
    """
    taken = [0] * len(sources)
    total = sum(weights)
    while True:
        behind = [weight * sum(taken) / total - b for weight, b in zip(weights, taken, strict=True)]
        i = behind.index(max(behind))
        try:
            item = next(sources[i])
        except StopIteration:
            return
        item_size = size(item)
        taken[i] += item_size
        yield i, item_size, item
