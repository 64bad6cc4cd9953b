"""Passages: nothing is lost, none is too long, and cuts fall where a reader pauses."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.knowledge.passages import CHARS, passages

PIECES = st.sampled_from(
    ["word", "a", " ", "  ", "\n", "\n\n", ". ", "! ", "。", "「東京。」", "\t", "é", "x" * 30, "?", "😀"]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=200).map("".join)), st.integers(2, 60))
def test_nothing_is_lost_and_none_is_too_long(text: str, chars: int) -> None:
    found = list(passages(text, chars))
    assert "".join(found) == text
    assert all(0 < len(passage) <= chars for passage in found)
    assert all(2 * len(passage) >= chars - 1 for passage in found[:-1])


@pytest.mark.parametrize(
    ("text", "chars", "expected"),
    [
        ("", 20, []),
        ("short", 20, ["short"]),
        ("# Head\n\nText of it.\n\nMore text here.", 24, ["# Head\n\nText of it.\n\n", "More text here."]),
        ("One is. Two is so. Three is not.", 24, ["One is. Two is so. ", "Three is not."]),
        ('He said: "No." She left then.', 20, ['He said: "No." ', "She left then."]),
        ("not a pause 3.14159 in it", 16, ["not a pause ", "3.14159 in it"]),
        ("東京は日本の首都。人口は多い。", 12, ["東京は日本の首都。", "人口は多い。"]),
        ("x" * 25, 10, ["x" * 10, "x" * 10, "x" * 5]),
        ("line one\nline two\nline three", 20, ["line one\nline two\n", "line three"]),
    ],
)
def test_cuts_by_hand(text: str, chars: int, expected: list[str]) -> None:
    assert list(passages(text, chars)) == expected


def test_a_novel_is_cut_between_sentences(shared_data: Path) -> None:
    text = (shared_data / "text/books/dracula.txt").read_text(encoding="utf-8")
    found = list(passages(text))
    assert "".join(found) == text
    assert max(map(len, found)) <= CHARS
    ends = [passage.rstrip()[-1:] in tuple(".!?…\"'”’)]_*-—:;") for passage in found]
    assert sum(ends) / len(ends) > 0.99
