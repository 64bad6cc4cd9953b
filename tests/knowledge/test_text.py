"""Text processing: passages lose nothing and end at natural boundaries; terms match the index in every script."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.knowledge.text import MAX_CHARS, index_text, search_terms, split_passages

# --- Passages

PIECES = st.sampled_from(
    ["word", "a", " ", "  ", "\n", "\n\n", ". ", "! ", "。", "「東京。」", "\t", "é", "x" * 30, "?", "😀"]
)


@given(st.one_of(st.text(), st.lists(PIECES, max_size=200).map("".join)), st.integers(2, 60))
def test_passages_are_bounded_and_join_to_the_text(text: str, chars: int) -> None:
    found = list(split_passages(text, chars))
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
def test_boundaries_by_hand(text: str, chars: int, expected: list[str]) -> None:
    assert list(split_passages(text, chars)) == expected


def test_a_novel_is_split_between_sentences(shared_data: Path) -> None:
    text = (shared_data / "text/books/dracula.txt").read_text(encoding="utf-8")
    found = list(split_passages(text))
    assert "".join(found) == text
    assert max(map(len, found)) <= MAX_CHARS
    ends = [passage.rstrip()[-1:] in tuple(".!?…\"'”’)]_*-—:;") for passage in found]
    assert sum(ends) / len(ends) > 0.99


# --- Search terms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("What is a well-known 'BO-105'?", ["what", "is", "a", "well", "known", "bo", "105"]),
        ("one One ONE", ["one"]),
        ('"a" OR b* NEAR(c, 2) ^d col:e', ["a", "or", "b", "near", "c", "2", "d", "col", "e"]),
        ("'; DROP TABLE passages; --", ["drop", "table", "passages"]),
        ("东京在哪里", ["东 京", "京 在", "在 哪", "哪 里"]),
        ("GPT是什么?", ["gpt", "是 什", "什 么"]),
        ("猫 cat", ["猫", "cat"]),
        ("snake_case\0null", ["snake", "case", "null"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("co\u00adoperate \u2066test\u2067 \ufeffend", ["cooperate", "test", "end"]),
        ("😀 — ?! 🦹\u200d♂\ufe0f", []),
    ],
)
def test_terms_by_hand(text: str, expected: list[str]) -> None:
    assert search_terms(text) == expected


def test_only_unspaced_scripts_are_spaced() -> None:
    assert index_text("abc δεζ где 한국어 2,5") == "abc δεζ где 한국어 2,5"
    assert index_text("a東b").split() == ["a", "東", "b"]


TEXTS = [
    "The Count's boxes were shipped to Varna.", "Größe, Straße, cafés, naïveté, Ångström", "Москва — столица России",
    "كيف حالك اليوم", "中华人民共和国的首都是北京。", "東京タワーの高さは333メートルです",
    "ประเทศไทยมีประชากรมาก", "한국의 수도는 서울이다", "हिन्दी भारत की भाषा है", "Tiếng Việt có dấu",
    "cafe\u0301 de\u0301ja\u0300 vu", "𠀀𠀁𠀂 rare",
    "\ufeffco\u00adoperate \u2066test\u2067 zero\u200bwidth", "great🤩 🏳0🌈\ufe0f",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_every_term_of_a_text_matches_it(text: str) -> None:
    index = sqlite3.connect(":memory:")
    index.execute("CREATE VIRTUAL TABLE t USING fts5 (text, tokenize='porter unicode61 remove_diacritics 2')")
    index.execute("INSERT INTO t VALUES (?)", (index_text(text),))
    for word in search_terms(text):
        assert index.execute("SELECT count(*) FROM t WHERE t MATCH ?", (f'"{word}"',)).fetchone() == (1,), word
    index.close()


def test_naughty_strings_are_never_fts_syntax(shared_data: Path) -> None:
    index = sqlite3.connect(":memory:")
    index.execute("CREATE VIRTUAL TABLE t USING fts5 (text)")
    for line in (shared_data / "messy/blns.txt").read_text(encoding="utf-8").split("\n"):
        for word in search_terms(line):
            index.execute("SELECT count(*) FROM t WHERE t MATCH ?", (f'"{word}"',)).fetchone()
    index.close()
