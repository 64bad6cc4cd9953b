"""Reads tuning datasets: conversations, preference pairs and questions, from JSONL, JSON arrays, Parquet or the Hugging
Face Hub.

Every row that is skipped is counted by reason in RowCounts, and the first of each reason is reported with its line.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import orjson

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.conversations import formats, oasst
from anarchobot.data.sources import compressed, files, hub, parquet, rows
from anarchobot.data.sources.files import SHOWN, EmptyFile, FileRange, Unread, describe_unread
from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import (
    Conversation,
    InvalidRow,
    LabeledConversation,
    PreferencePair,
    Question,
)

RawRows = Iterator[tuple[str, bytes | Row | ValueError]]  # (place, undecoded line, row or error)
ParsedRows = Iterator[tuple[str, Row]]
SHOWN_FIELDS = 20
T = TypeVar("T", Conversation, PreferencePair, PreferencePair | LabeledConversation, Question)


class UnknownFields(UserError):
    """A file without any row of a known format."""


@dataclass
class RowCounts:
    """What happened to the rows of a dataset: `read` = `kept` + the sum of `skipped`.

    `truncated` rows are among the kept; `truncated_loss_tokens` of their `loss_tokens` were cut off. OASST trees are
    counted in `trees`, and their threads, pairs and unusable messages in `tree_rows`, which is part of `read`.
    """

    read: int = 0
    kept: int = 0
    truncated: int = 0
    loss_tokens: int = 0
    truncated_loss_tokens: int = 0
    trees: int = 0
    tree_rows: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)  # by reason: place and detail
    places: dict[str, list[str]] = field(default_factory=dict)  # by reason or part: the first SHOWN places
    unused: Counter[str] = field(default_factory=Counter)  # kept rows with each part that is not used
    other_fields: Counter[str] = field(default_factory=Counter)  # kept rows with each other field that is not used
    unread: list[Unread] = field(default_factory=list)  # files in folders and globs

    def skip(self, place: str, error: ValueError) -> None:
        reason = error.reason if isinstance(error, InvalidRow) else "malformed row"
        self.skipped[reason] += 1
        self.first_skipped.setdefault(reason, f"{place}: {error}")
        self._add_place(reason, place)

    def note_unused(self, place: str, row: Row, used: tuple[str, ...]) -> None:
        """Counts what is not used of a row that is kept; `used` are the fields that its format reads."""
        self.note_parts(place, formats.unused_parts(row))
        self.other_fields.update(formats.unused_fields(row, used))

    def note_parts(self, place: str, parts: Iterable[str]) -> None:
        """Counts parts of a row that are not used."""
        for part in parts:
            self.unused[part] += 1
            self._add_place(part, place)

    def _add_place(self, kind: str, place: str) -> None:
        places = self.places.setdefault(kind, [])
        if len(places) < SHOWN and place not in places:
            places.append(place)

    def skip_kept(self, place: str, error: InvalidRow) -> None:
        """Skips a row that was already counted as kept."""
        self.kept -= 1
        self.skip(place, error)

    def summary(self) -> list[str]:
        """One line with the totals, then one per reason that rows were skipped, parts of them not used or files not
        read, with up to SHOWN places."""
        plain_rows = self.read - self.tree_rows
        sources = [f"{plain_rows:,} rows"] if plain_rows or not self.trees else []
        if self.trees:
            pairs = f"{self.tree_rows:,} pairs from " if self.tree_rows != self.trees else ""
            sources.append(f"{pairs}{self.trees:,} trees")
        lost = self.truncated_loss_tokens
        dropped = f" ({lost / self.loss_tokens:.1%} of loss tokens dropped: beyond data.seq_len)" if lost else ""
        truncated = f", {self.truncated:,} truncated{dropped}" if self.truncated else ""
        lines = [f"{' and '.join(sources)} read, {self.kept:,} kept{truncated}"]
        for reason, n in self.skipped.most_common():
            also = ", ".join(self.places[reason][1:])
            lines.append(f"skipped {n:,}: {self.first_skipped[reason]}{f'; also {also}' if also else ''}")
        for part, n in self.unused.most_common():
            lines.append(
                f"not used in {n:,} rows: {part} ({', '.join(self.places[part])}{', ...' if n > SHOWN else ''})"
            )
        if self.other_fields:
            fields = [f"{name} in {n:,} rows" for name, n in self.other_fields.most_common(SHOWN_FIELDS)]
            more = len(self.other_fields) - len(fields)
            lines.append(f"other fields not used: {', '.join(fields)}{f', and {more:,} more' if more else ''}")
        return lines + describe_unread(self.unread)


def read_conversations(
    data: DataConfig, counts: RowCounts, format: str = "auto", language: str | None = None
) -> Iterator[tuple[str, Conversation]]:
    """(place, conversation) of each valid row of `data.dataset`; the others are counted in `counts` as they are read.

    `format` is one of formats.FORMATS, "oasst" or "text" (the field `data.text_field`); "auto" detects it for each file
    from its first row with known fields. `language` filters OASST trees. Raises UserError if a dataset is missing or
    unreadable, or no row of a file has known fields.
    """

    def parse_file(name: str, parsed: ParsedRows) -> Iterator[tuple[str, Conversation | InvalidRow]]:
        detected = format if format != "auto" else None
        for place, row in parsed:
            detected = detected or _detect_format(row, data.text_field)
            if detected is None:
                yield place, InvalidRow("unknown fields", f"the row has {', '.join(sorted(row)) or 'no fields'}")
            elif detected == "oasst":
                yield from _count_trees(oasst.threads(chain([(place, row)], parsed), language), counts)
            else:
                parsed_row = _parse(detected, row, data.text_field)
                if detected != "text" and not isinstance(parsed_row, InvalidRow):
                    counts.note_unused(place, row, formats.FORMATS[detected].fields)
                yield place, parsed_row
        if detected is None:
            problem = f"no row has the fields of a conversation: expected {formats.EXPECTED}"
            raise UnknownFields(f"{name}: {problem}{_first_error(counts)}")

    return _valid_rows(data, counts, parse_file)


def read_pairs(
    data: DataConfig, counts: RowCounts, language: str | None = None
) -> Iterator[tuple[str, PreferencePair]]:
    """(place, pair) of each valid row of `data.dataset`; arguments and errors as for `read_conversations`."""
    expected = f"{formats.EXPECTED_PAIRS}; labels of single answers are for preference.loss: kto"
    for place, item in _read_preferences(data, counts, language, formats.PAIR_FORMATS, expected):
        assert isinstance(item, PreferencePair)
        yield place, item


def read_labeled(
    data: DataConfig, counts: RowCounts, language: str | None = None
) -> Iterator[tuple[str, PreferencePair | LabeledConversation]]:
    """(place, item) of each valid row of `data.dataset`: a conversation with a label, or a pair; arguments and errors
    as for `read_conversations`."""
    return _read_preferences(data, counts, language, formats.LABELED_FORMATS, formats.EXPECTED_LABELED)


def read_questions(
    data: DataConfig, counts: RowCounts, check_answer: Callable[[Any], None] = lambda answer: None
) -> Iterator[tuple[str, Question]]:
    """(place, question) of each valid row of `data.dataset`; errors as for `read_conversations`. `check_answer` raises
    InvalidRow for an answer that can't be used."""

    def parse_file(name: str, parsed: ParsedRows) -> Iterator[tuple[str, Question | InvalidRow]]:
        any_matched = False
        for place, row in parsed:
            any_matched = any_matched or formats.has_prompt(row)
            try:
                question = formats.parse_question(row)
                check_answer(question.answer)
            except InvalidRow as error:
                yield place, error
                continue
            counts.note_unused(place, row, formats.QUESTION_FIELDS)
            yield place, question
        if not any_matched:
            problem = f"no row has a prompt: expected {formats.EXPECTED_QUESTIONS}"
            raise UnknownFields(f"{name}: {problem}{_first_error(counts)}")

    return _valid_rows(data, counts, parse_file)


def _read_preferences(
    data: DataConfig,
    counts: RowCounts,
    language: str | None,
    known: Sequence[formats.PreferenceFormat],
    expected: str,
) -> Iterator[tuple[str, PreferencePair | LabeledConversation]]:
    """Rows in the first of the `known` formats that matches; OASST trees become pairs."""

    def parse_file(
        name: str, parsed: ParsedRows
    ) -> Iterator[tuple[str, PreferencePair | LabeledConversation | InvalidRow]]:
        any_matched = False
        for place, row in parsed:
            if not any_matched and oasst.is_oasst_row(row):
                yield from _count_trees(oasst.ranked_pairs(chain([(place, row)], parsed), language), counts)
                return
            matching = next((format for format in known if format.matches(row)), None)
            any_matched = any_matched or matching is not None
            format = matching or known[0]  # whose error names a missing field
            try:
                item = format.parse(row)
            except InvalidRow as error:
                yield place, error
                continue
            counts.note_unused(place, row, format.fields)
            yield place, item
        if not any_matched:
            problem = f"no row has the fields of a preference: expected {expected}"
            raise UnknownFields(f"{name}: {problem}{_first_error(counts)}")

    return _valid_rows(data, counts, parse_file)


def _first_error(counts: RowCounts) -> str:
    return f" (first skipped: {next(iter(counts.first_skipped.values()))})" if counts.first_skipped else ""


def _count_trees(
    items: Iterator[tuple[str, T | InvalidRow]], counts: RowCounts
) -> Iterator[tuple[str, T | InvalidRow]]:
    """Counts trees: consecutive items with the same place come from one tree."""
    tree = ""
    for place, item in items:
        counts.trees += place != tree
        counts.tree_rows += 1
        tree = place
        yield place, item


def _detect_format(row: Row, text_field: str) -> str | None:
    if oasst.is_oasst_row(row):
        return "oasst"
    known = next((name for name, format in formats.FORMATS.items() if format.matches(row)), None)
    if known is None and text_field in row:
        return "text"
    return known or ("prompt_completion" if formats.is_question_and_answer(row) else None)


def _parse(format: str, row: Row, text_field: str) -> Conversation | InvalidRow:
    try:
        if format == "text":
            return formats.from_text(row, text_field)
        formats.check_row(row)
        return formats.FORMATS[format].parse(row)
    except InvalidRow as error:
        return error


def _valid_rows(
    data: DataConfig, counts: RowCounts, parse_file: Callable[[str, ParsedRows], Iterator[tuple[str, T | InvalidRow]]]
) -> Iterator[tuple[str, T]]:
    """The valid items of all files; everything is counted."""
    for name, raw_rows, is_named in _open_files(data, counts):
        try:
            for place, item in parse_file(name, _parsed(raw_rows, counts)):
                counts.read += 1
                if isinstance(item, InvalidRow):
                    counts.skip(place, item)
                else:
                    counts.kept += 1
                    yield place, item
        except EmptyFile:
            if is_named:
                raise
            counts.unread.append(Unread(name, "empty files"))
        except UnknownFields:  # folders of data sets have .json files about the data; their rows are counted
            if is_named or not files.is_json(Path(name)):
                raise


def _parsed(raw_rows: RawRows, counts: RowCounts) -> ParsedRows:
    for place, content in raw_rows:
        try:
            if isinstance(content, ValueError):
                raise content
            yield place, rows.parse(content) if isinstance(content, bytes) else content
        except ValueError as error:
            counts.read += 1
            counts.skip(place, error)


def _open_files(data: DataConfig, counts: RowCounts) -> Iterator[tuple[str, RawRows, bool]]:
    """(name, rows, whether the file itself was named) of each file of `data.dataset`, in order.

    Hub datasets are not shuffled while streaming: all rows are held in memory and shuffled in training. Raises
    UserError if a dataset is missing or unreadable.
    """
    if data.dataset is None:
        raise UserError("data.dataset is not set: expected JSONL, JSON or Parquet files, or a Hugging Face dataset")
    for name in data.datasets:
        if hub.is_hub_name(name):
            unshuffled = data.model_copy(update={"shuffle_buffer": 0})
            numbered = enumerate(hub.rows(name, unshuffled, seed=0, suggest_fallback=False))
            yield name, ((f"{name}: row {i}", row) for i, row in numbered), True
            continue
        for path in files.find([name], counts.unread, files.CONVERSATIONS):
            yield str(path), _read_file(path), path == Path(name)


def _read_file(path: Path) -> RawRows:
    try:
        if files.is_parquet(path):
            yield from parquet.read_rows(path)
        elif files.is_json(path):
            yield from _read_json(path)
        else:
            yield from rows.read_jsonl(FileRange(path))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from error


def _read_json(path: Path) -> RawRows:
    if _is_json_array(path):
        yield from _read_json_array(path)
    elif (row := _read_json_object(path)) is not None:
        yield f"{path}: row 0", row
    else:
        yield from rows.read_jsonl(FileRange(path))


def _is_json_array(path: Path) -> bool:
    """Many files named .json are JSONL."""
    with compressed.DecompressedFile(path) as file:
        return file.read(64).removeprefix(rows.BOM).lstrip().startswith(b"[")


def _read_json_object(path: Path) -> Row | None:
    """The object in a file whose only content it is, on several lines; otherwise None."""
    first = next(
        (line for _, line in compressed.read_lines(FileRange(path)) if isinstance(line, ValueError) or line.strip()),
        b"",
    )
    if isinstance(first, ValueError) or not first.removeprefix(rows.BOM).lstrip().startswith(b"{"):
        return None
    try:
        rows.parse(first)
    except ValueError:
        try:
            return rows.parse(compressed.read_all(path))
        except ValueError:
            return None
    return None


def _read_json_array(path: Path) -> RawRows:
    """Alpaca and ShareGPT are distributed as one JSON array; it is loaded at once."""
    try:
        items = orjson.loads(compressed.read_all(path).removeprefix(rows.BOM))
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: {error.msg} (character {error.pos + 1})") from error
    except ValueError as error:  # truncated file
        raise UserError(f"{path}: {error}") from error
    if not items:
        raise EmptyFile(f"{path}: the file is empty")
    for i, item in enumerate(items):
        yield f"{path}: row {i}", item if isinstance(item, dict) else ValueError("not a JSON object")
