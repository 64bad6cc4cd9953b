"""Datasets for tuning to conversations and pairs, with a count of every row that is none."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import TypeVar

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.conversations import formats, oasst, preferences
from anarchobot.data.conversations.sources import Raw, open_files
from anarchobot.data.conversations.tally import Tally
from anarchobot.data.sources import rows
from anarchobot.data.sources.rows import Row
from anarchobot.tokenizers.conversation import Conversation, InvalidRow, Pair

Rows = Iterator[tuple[str, Row]]
T = TypeVar("T", Conversation, Pair)


def conversations(
    data: DataConfig, tally: Tally, form: str = "auto", language: str | None = None
) -> Iterator[tuple[str, Conversation]]:
    """(place, conversation) of each good row of `data.dataset`; `tally` counts the others as they are met.

    `form`: one of formats.FORMATS, "oasst" or "text" (the field `data.text_field`); "auto" tells it for each file by
    the fields of the first row that has known ones. `language`: of OASST's trees. Raises UserError for a dataset that
    can't be found or read, and for a file of which no row has the fields.
    """

    def of_file(name: str, found: Rows) -> Iterator[tuple[str, Conversation | InvalidRow]]:
        known = form if form != "auto" else None
        for place, row in found:
            known = known or _form_of(row, data.text_field)
            if known is None:
                yield place, InvalidRow("no known fields", f"it has {', '.join(sorted(row)) or 'nothing'}")
            elif known == "oasst":
                yield from _of_trees(oasst.threads(chain([(place, row)], found), language), tally)
            else:
                yield place, _read(known, row, data.text_field)
        if known is None:
            told = f"no row has the fields of a conversation: expected {formats.EXPECTED}"
            raise UserError(f"{name}: {told}{_left_out(tally)}")

    return _counted(data, tally, of_file)


def pairs(data: DataConfig, tally: Tally, language: str | None = None) -> Iterator[tuple[str, Pair]]:
    """(place, pair) of each good row of `data.dataset`; the rest as for `conversations`."""

    def of_file(name: str, found: Rows) -> Iterator[tuple[str, Pair | InvalidRow]]:
        any_fits = False
        for place, row in found:
            if not any_fits and oasst.fits(row):
                yield from _of_trees(oasst.pairs(chain([(place, row)], found), language), tally)
                return
            any_fits = any_fits or preferences.fits(row)
            try:
                yield place, preferences.pair(row)
            except InvalidRow as misfit:
                yield place, misfit
        if not any_fits:
            told = f"no row has the fields of a preference: expected {preferences.EXPECTED}"
            raise UserError(f"{name}: {told}{_left_out(tally)}")

    return _counted(data, tally, of_file)


def _left_out(tally: Tally) -> str:
    """For the end of an error's line: the first row that could not be read."""
    return f" (left out first: {next(iter(tally.first.values()))})" if tally.first else ""


def _of_trees(found: Iterator[tuple[str, T | InvalidRow]], tally: Tally) -> Iterator[tuple[str, T | InvalidRow]]:
    """Counts the trees too: what comes of one comes from one place."""
    tree = ""
    for place, item in found:
        tally.trees += place != tree
        tally.of_trees += 1
        tree = place
        yield place, item


def _form_of(row: Row, text_field: str) -> str | None:
    if oasst.fits(row):
        return "oasst"
    return next(
        (name for name, form in formats.FORMATS.items() if form.fits(row)), "text" if text_field in row else None
    )


def _read(form: str, row: Row, text_field: str) -> Conversation | InvalidRow:
    try:
        return formats.of_text(row, text_field) if form == "text" else formats.FORMATS[form].read(row)
    except InvalidRow as misfit:
        return misfit


def _counted(
    data: DataConfig, tally: Tally, of_file: Callable[[str, Rows], Iterator[tuple[str, T | InvalidRow]]]
) -> Iterator[tuple[str, T]]:
    """The good ones of all files; what is no row, and what does not fit, is counted."""
    for name, found in open_files(data):
        for place, item in of_file(name, _parsed(found, tally)):
            tally.read += 1
            if isinstance(item, InvalidRow):
                tally.leave_out(place, item)
            else:
                tally.kept += 1
                yield place, item


def _parsed(found: Raw, tally: Tally) -> Rows:
    for place, content in found:
        try:
            if isinstance(content, ValueError):
                raise content
            yield place, rows.parse(content) if isinstance(content, bytes) else content
        except ValueError as error:
            tally.read += 1
            tally.leave_out(place, error)
