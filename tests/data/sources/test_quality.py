"""The clean-up takes out what it names and nothing else."""

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.config.schema import DataConfig
from anarchobot.data.sources.quality import clean, why_left_out


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a \t\nb\u3000\u00a0\n\nc ", "a\nb\n\nc"),
        (" \tindent stays\n  too", " \tindent stays\n  too"),
        ("one\r\ntwo\r\r\nthree\rfour\x0cfive\x0bsix\x85seven", "one\ntwo\n\nthree\nfour\nfive\nsix\nseven"),
        ("\0be\x07ll\x1b[0m\x7f\x9f", "bell[0m"),
        ("white space \x00\n", "white space\n"),
        (
            "\ufeff\u200bzero\u00ad width\u202e Å Å ﬁ \U000e0001\n",
            "\ufeff\u200bzero\u00ad width\u202e Å Å ﬁ \U000e0001\n",
        ),
        ("a \n \n", "a\n\n"),
    ],
)
def test_what_is_cleaned(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@given(st.text(alphabet=st.one_of(st.sampled_from("\r\n\t \x0b\x0c\x1c\x85\xa0\u2028ab\0"), st.characters())))
def test_any_text_is_cleaned_as_unicodes_own_tables_say(text: str) -> None:
    """Line ends first, then character by character, by category; a second pass changes nothing."""
    text_of_lines = text.replace("\r\n", "\n")
    for end in "\r\x0b\x0c\x85":
        text_of_lines = text_of_lines.replace(end, "\n")
    kept = "".join(c for c in text_of_lines if c in "\n\t" or unicodedata.category(c) != "Cc")
    assert clean(text) == "\n".join(line.rstrip() for line in kept.split("\n"))
    assert clean(clean(text)) == clean(text)


def test_long_white_space_is_cleaned_in_linear_time() -> None:
    """A backtracking pattern would take hours."""
    assert clean((" " * 1_000_000 + "x") * 3) == (" " * 1_000_000 + "x") * 3


def test_naughty_strings_lose_only_controls_and_white_space(shared_data: Path) -> None:
    text = (shared_data / "messy" / "blns.txt").read_bytes().decode()
    lost = set(text) - set(clean(text))
    assert lost and all(unicodedata.category(c) == "Cc" or c.isspace() for c in lost)


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "blank"), (" \u3000\n", "blank"), ("abc", "too short"), ("abcd", ""), ("äöü🙂ß", ""), ("sechs!", "too long")],
)
def test_why_a_text_is_left_out(text: str, why: str) -> None:
    assert why_left_out(text, DataConfig(min_chars=4, max_chars=5)) == why
