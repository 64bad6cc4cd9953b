"""TF-IDF computed by hand."""

import math

from anarchobot.vocab.domain_terms import mine_terms, words

DOMAIN = ["the kinase binds the kinase", "kinase and the ligand", "the Golgi ligand binds"]
GENERAL = ["the cat binds the book", "the dog", "and so on", "the end"]


def mined(**settings: object) -> list[tuple[str, int, float]]:
    plain: dict[str, object] = {"top_k": 10, "min_frequency": 1, "use_tfidf": True}
    return [(t.text, t.frequency, t.score) for t in mine_terms(DOMAIN, GENERAL, **{**plain, **settings})]  # type: ignore[arg-type]


def test_the_scores_by_hand() -> None:
    """idf = log(5 / (1 + df)): kinase 3 log 5, ligand 2 log 5, binds 2 log(5/2), the 4 log(5/4)."""
    found = mined()
    assert [(name, n) for name, n, _ in found] == [
        ("kinase", 3), ("ligand", 2), ("binds", 2), ("Golgi", 1), ("and", 1), ("the", 4)
    ]  # fmt: skip
    scores = [3 * math.log(5), 2 * math.log(5), 2 * math.log(2.5), math.log(5), math.log(2.5), 4 * math.log(1.25)]
    assert all(math.isclose(score, wanted) for (_, _, score), wanted in zip(found, scores, strict=True))


def test_settings() -> None:
    assert [name for name, *_ in mined(top_k=2)] == ["kinase", "ligand"]
    assert [name for name, *_ in mined(min_frequency=3)] == ["kinase", "the"]
    assert [name for name, *_ in mined(use_tfidf=False)][:2] == ["the", "kinase"]
    assert [name for name, *_ in mined(top_k=1, is_known=lambda word: word == "kinase")] == ["ligand"]


def test_words() -> None:
    assert words("TGF-beta1 (p53), naïve клетка x_y") == ["TGF-beta", "p", "naïve", "клетка", "x", "y"]
