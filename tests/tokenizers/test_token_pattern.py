"""Added tokens in text, against Hugging Face's library."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from anarchobot.tokenizers.token_pattern import TokenPattern

FLAGS = ("lstrip", "rstrip", "single_word")
CONTENTS = st.lists(st.text("<|ab>", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)
TOKENS = CONTENTS.flatmap(
    lambda contents: st.tuples(
        *(st.fixed_dictionaries({"content": st.just(c), **{flag: st.booleans() for flag in FLAGS}}) for c in contents)
    )
)


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS, text=st.text("<|ab> \n\u3000\x1c", max_size=30))
def test_matches_equal_the_librarys(tokens: tuple[dict[str, Any], ...], text: str) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, "[UNK]"))
    library.add_special_tokens([tokenizers.AddedToken(**token) for token in tokens])
    theirs = library.encode(text, add_special_tokens=False)
    expected = [(*offsets, i) for i, offsets in zip(theirs.ids, theirs.offsets, strict=True) if i]
    ours = TokenPattern(tokens).finditer(text)
    assert [(m.start, m.end, library.token_to_id(m.content)) for m in ours] == expected


def test_a_search_ignores_text_outside_its_range() -> None:
    pattern = TokenPattern(({"content": "<a>", "lstrip": True, "rstrip": True},))
    text = "x  <a>  <a>"
    assert pattern.search(text, 2, 7) == (2, 7, "<a>")
    assert pattern.search(text, 2, 5) is None
    assert pattern.search(text, 8) == (8, 11, "<a>")
    assert TokenPattern(()).search(text) is None


def test_text_is_split_inside_overlapping_tokens() -> None:
    pattern = TokenPattern(({"content": "aba"}, {"content": "ab"}, {"content": "b"}))
    assert pattern.split_inside("xababa") == ["xa", "b", "a", "b", "a"]
    assert pattern.split_inside("") == [""]


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Fails after `seconds` of this process's own computing time, however busy the machine."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:g} seconds of computing")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


NAMES = [f"<|reserved_special_token_{i}|>" for i in range(250)]
MIB = 2**20


@pytest.mark.parametrize("unit", [" ", "<|", NAMES[0][:-2], " " + NAMES[249] + " "])
def test_a_mebibyte_takes_linear_time(unit: str) -> None:
    """Under a tenth of a second each; a whitespace run tried from each of its positions takes hours, and one
    alternative per token half a minute."""
    pattern = TokenPattern(tuple({"content": name, "lstrip": True, "rstrip": True} for name in NAMES))
    text = unit * (MIB // len(unit))
    with cpu_limit(8):
        matches = list(pattern.finditer(text))
        parts = pattern.split_inside(text)
    count = MIB // len(unit) if unit.strip() in NAMES else 0
    assert len(matches) == count and len(parts) == count + 1
