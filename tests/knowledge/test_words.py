"""What is searched for is what is indexed, in every script, and no word of a question is syntax."""

import sqlite3
from pathlib import Path

import pytest

from anarchobot.knowledge.words import spaced, words


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
def test_words_by_hand(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_only_scripts_without_spaces_are_spaced() -> None:
    assert spaced("abc δεζ где 한국어 2,5") == "abc δεζ где 한국어 2,5"
    assert spaced("a東b").split() == ["a", "東", "b"]


TEXTS = [
    "The Count's boxes were shipped to Varna.", "Größe, Straße, cafés, naïveté, Ångström", "Москва — столица России",
    "كيف حالك اليوم", "中华人民共和国的首都是北京。", "東京タワーの高さは333メートルです",
    "ประเทศไทยมีประชากรมาก", "한국의 수도는 서울이다", "हिन्दी भारत की भाषा है", "Tiếng Việt có dấu",
    "cafe\u0301 de\u0301ja\u0300 vu", "𠀀𠀁𠀂 rare",
    "\ufeffco\u00adoperate \u2066test\u2067 zero\u200bwidth", "great🤩 🏳0🌈\ufe0f",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_every_word_of_a_text_finds_it(text: str) -> None:
    index = sqlite3.connect(":memory:")
    index.execute("CREATE VIRTUAL TABLE t USING fts5 (text, tokenize='porter unicode61 remove_diacritics 2')")
    index.execute("INSERT INTO t VALUES (?)", (spaced(text),))
    for word in words(text):
        assert index.execute("SELECT count(*) FROM t WHERE t MATCH ?", (f'"{word}"',)).fetchone() == (1,), word
    index.close()


def test_naughty_strings_are_never_syntax(shared_data: Path) -> None:
    index = sqlite3.connect(":memory:")
    index.execute("CREATE VIRTUAL TABLE t USING fts5 (text)")
    for line in (shared_data / "messy/blns.txt").read_text(encoding="utf-8").split("\n"):
        for word in words(line):
            index.execute("SELECT count(*) FROM t WHERE t MATCH ?", (f'"{word}"',)).fetchone()
    index.close()
