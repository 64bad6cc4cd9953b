"""ROUGE matches the package on English, and hand counts on scripts that the package ignores."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from anarchobot.config.errors import UserError
from anarchobot.evaluation.rouge import KINDS, rouge, words


def f1(matches: float, expected: int, given: int) -> float:
    return 2 * (matches / expected) * (matches / given) / (matches / expected + matches / given) if matches else 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop_now, x2!", ["don", "t", "stop", "now", "x2"]),
        ("Київ — це МІСТО", ["київ", "це", "місто"]),
        ("我爱猫cat和3只狗。", ["我", "爱", "猫", "cat", "和", "3", "只", "狗"]),
        ("吾輩はネコである", list("吾輩はネコである")),
        ("สวัสดี 123", [*"สวัสดี", "123"]),
        ("ສະບາຍ", list("ສະບາຍ")),
        ("សួស្តី", list("សួស្តី")),
        ("မင်္ဂလာ", list("မင်္ဂလာ")),
        ("안녕하세요 세계", ["안녕하세요", "세계"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # vowel signs are marks, part of the word
        ("cafe\u0301 CAFÉ", ["café", "café"]),
        ("مرحبا ١٢٣", ["مرحبا", "١٢٣"]),
        (" …!?\n", []),
    ],
)
def test_words_of_every_script(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@given(st.text(st.characters(max_codepoint=127)))
def test_english_words_match_the_package(text: str) -> None:
    assert words(text) == tokenize(text, None)


def test_english_scores_match_the_package(shared_data: Path) -> None:
    rows = json.loads((shared_data / "instruct" / "alpaca_en.json").read_text(encoding="utf-8"))[:40]
    texts = [row["output"] for row in rows if row["output"].isascii()]
    scorer = RougeScorer(list(KINDS))
    for reference, text in pairwise(texts):
        own = scorer.score(reference, text)
        assert rouge([(reference, text)]) == pytest.approx({kind: own[kind].fmeasure for kind in KINDS})


def test_hand_counts() -> None:
    # кот сидит на окне / на окне сидит кот: four shared words, one shared bigram, common subsequence of two.
    assert rouge([("Кот сидит на окне.", "На окне сидит кот!")]) == pytest.approx(
        {"rouge1": 1.0, "rouge2": f1(1, 3, 3), "rougeL": f1(2, 4, 4)}
    )
    # 我 爱 北 京 / 我 爱 上 海 城: two shared words of four and five, one bigram of three and four, subsequence of two.
    assert rouge([("我爱北京", "我爱上海城")]) == pytest.approx(
        {"rouge1": f1(2, 4, 5), "rouge2": f1(1, 3, 4), "rougeL": f1(2, 4, 5)}
    )


def test_identical_texts_score_one_and_scores_are_averaged() -> None:
    same = ["Привет, мир", "你好世界", "नमस्ते दुनिया", "hello there"]
    assert rouge((text, text) for text in same) == pytest.approx(dict.fromkeys(KINDS, 1.0))
    assert RougeScorer(["rouge1"]).score(same[1], same[1])["rouge1"].fmeasure == 0, "with the package's own words"
    assert rouge([("a b", "a b"), ("a b", "c d")]) == pytest.approx(dict.fromkeys(KINDS, 0.5))
    assert rouge([]) == rouge([("", "")]) == rouge([("a", "")]) == dict.fromkeys(KINDS, 0.0)


def test_missing_package_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match="pip install rouge-score"):
        rouge([("a", "a")])
