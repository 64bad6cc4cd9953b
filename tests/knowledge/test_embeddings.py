"""The index by embeddings: fused with the search by keyword, kept up to date, and refused if it is another model's.

The encoder of these tests maps words of the same meaning to the same dimension.
"""

import hashlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from anarchobot.config.schema import KnowledgeBaseConfig
from anarchobot.knowledge import embeddings, retrieval
from anarchobot.knowledge.database import KnowledgeBaseError
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from tests.knowledge.bases import add, make_base, write_rows

MEANINGS = {"physician": 0, "doctor": 0, "automobile": 1, "car": 1, "dwelling": 2, "house": 2}
TEXTS = (
    "The physician was late.",
    "An automobile stood there.",
    "He left his dwelling.",
    "A car: a doctor in a house.",
)


class Encoder:
    """Counts of meanings and, much smaller, of the words themselves. `encoded` has all passages so far."""

    def __init__(self, name: str = "meanings", dimensions: int = 16) -> None:
        self.name, self.digest, self.dimensions = name, f"digest of {name}", dimensions
        self.encoded: list[str] = []
        self.fails_after: int | None = None

    def encode_question(self, text: str) -> npt.NDArray[np.float32]:
        vector = np.full(self.dimensions, 1e-3, np.float32)
        for word in text.lower().replace(".", "").replace(":", "").split():
            vector[MEANINGS.get(word, 3 + hashlib.sha256(word.encode()).digest()[0] % 13)] += word in MEANINGS or 0.1
        return vector / np.linalg.norm(vector)

    def encode_passages(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        if self.fails_after is not None and len(self.encoded) >= self.fails_after:
            raise KeyboardInterrupt
        self.encoded += texts
        return np.stack([self.encode_question(text) for text in texts])


def open_with(path: Path, encoder: Encoder | None, **options: Any) -> KnowledgeBase:
    return KnowledgeBase(path, KnowledgeBaseConfig(), create=True, encoder=encoder, **options)


def numbers(base: KnowledgeBase, question: str, k: int = 3) -> list[int]:
    return [hit.passage_id for hit in base.search(question, k)]


def test_passages_are_found_by_meaning(tmp_path: Path) -> None:
    make_base(tmp_path, TEXTS).close()
    with open_with(tmp_path / "kb.db", None) as base:
        assert numbers(base, "my doctor") == [4] and list(base.embed()) == [] and base.without_embedding() == 0
    with open_with(tmp_path / "kb.db", Encoder()) as base:
        assert base.without_embedding() == 4 and numbers(base, "my doctor") == [4]
        assert sum(base.embed()) == 4 and base.without_embedding() == 0
        assert set(numbers(base, "my doctor", 2)) == {1, 4} and numbers(base, "zebra car", 2) == [4, 2]
        assert numbers(base, "") != [], "a question without words still has an embedding"
    with open_with(tmp_path / "kb.db", None) as base:
        assert numbers(base, "my doctor") == [4], "as before without a model"


def test_scores_are_sums_of_reciprocal_ranks(tmp_path: Path) -> None:
    """By keyword: 4, then 1 (two words of 4 match). By embedding: 1, 4, then the others."""
    assert retrieval.fuse([7, 8], [8, 9]) == {7: 1 / 3, 8: 1 / 4 + 1 / 3, 9: 1 / 4}
    with make_base(tmp_path, TEXTS) as base:
        keyword = numbers(base, "doctor late")
    encoder = Encoder()
    with open_with(tmp_path / "kb.db", encoder) as base:
        list(base.embed())
        hits = base.search("doctor late", 4)
        vectors = encoder.encode_passages(TEXTS) @ encoder.encode_question("doctor late")
        by_embedding = [int(i) + 1 for i in np.argsort(-vectors)]
        sums = {
            n: sum(1 / (3 + ranking.index(n)) for ranking in (keyword, by_embedding) if n in ranking)
            for n in by_embedding
        }
        best = max(sums.values())
        assert {hit.passage_id: hit.score for hit in hits} == pytest.approx({n: s / best for n, s in sums.items()})
        for _ in range(4):
            base.feedback("doctor late", [hits[0].passage_id], -1.0)
        assert numbers(base, "doctor late", 4)[0] == hits[1].passage_id, "votes count as without embeddings"


def test_only_new_passages_are_embedded(tmp_path: Path) -> None:
    encoder = Encoder()
    with open_with(tmp_path / "kb.db", encoder) as base:
        add(base, write_rows(tmp_path / "texts.jsonl", TEXTS))
        assert sum(base.embed()) == 4 and sum(base.embed()) == 0
        add(base, write_rows(tmp_path / "texts.jsonl", (*TEXTS[1:], "One more car.")))
        assert base.without_embedding() == 1 and sum(base.embed()) == 1
        assert encoder.encoded == [*TEXTS, "One more car."]
        assert set(numbers(base, "automobile", 3)) == {2, 4, 5}, "also after the change"
        base.remove(str(tmp_path / "texts.jsonl"))
        assert base.without_embedding() == 0 and base.search("automobile") == []
    (count,) = sqlite3.connect(tmp_path / "kb.db").execute("SELECT count(*) FROM passage_vectors").fetchone()
    assert count == 0


def test_embedding_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "BATCH", 2)
    texts = [f"Text {i} of the doctor." for i in range(7)]
    make_base(tmp_path, texts).close()
    encoder = Encoder()
    encoder.fails_after = 4
    with open_with(tmp_path / "kb.db", encoder) as base, pytest.raises(KeyboardInterrupt):
        list(base.embed())
    with open_with(tmp_path / "kb.db", again := Encoder()) as base:
        assert base.without_embedding() == 3
        assert len(numbers(base, "physician", 7)) == 4, "those with an embedding; no passage has the word"
        assert list(base.embed()) == [2, 1] and again.encoded == texts[4:] and base.without_embedding() == 0


def test_embeddings_of_another_model_are_refused(tmp_path: Path) -> None:
    make_base(tmp_path, TEXTS).close()
    with open_with(tmp_path / "kb.db", Encoder()) as base:
        list(base.embed())
        with pytest.raises(KnowledgeBaseError, match=r"with meanings, not .* other: .*kb embed --rebuild"):
            open_with(tmp_path / "kb.db", Encoder("other", 32))
        other = Encoder("other", 32)
        with open_with(tmp_path / "kb.db", other, rebuild=True) as rebuilt:
            assert sum(rebuilt.embed()) == 4 and other.encoded == [*TEXTS]
            assert set(numbers(rebuilt, "my doctor", 2)) == {1, 4}
        with pytest.raises(KnowledgeBaseError, match="--rebuild"):
            base.search("my doctor")
        with pytest.raises(KnowledgeBaseError, match="--rebuild"):
            add(base, write_rows(tmp_path / "more.jsonl", ["more"]))
            list(base.embed())


def test_changes_by_another_process_are_seen(tmp_path: Path) -> None:
    make_base(tmp_path, TEXTS[:1]).close()
    with open_with(tmp_path / "kb.db", Encoder()) as base, open_with(tmp_path / "kb.db", Encoder()) as other:
        list(base.embed())
        assert numbers(base, "automobile") == [1]
        add(other, write_rows(tmp_path / "more.jsonl", TEXTS[1:2]))
        list(other.embed())
        assert numbers(base, "car") == [2, 1]


@pytest.mark.parametrize("vector", [b"short", "text", None])
def test_damaged_vector_is_reported(vector: object, tmp_path: Path) -> None:
    make_base(tmp_path, TEXTS).close()
    with open_with(tmp_path / "kb.db", Encoder()) as base:
        list(base.embed())
    database = sqlite3.connect(tmp_path / "kb.db")
    database.execute("PRAGMA ignore_check_constraints = ON")
    if vector is None:
        database.execute("DROP TABLE embedding_model")
    else:
        database.execute("UPDATE passage_vectors SET vector = ? WHERE passage = 2", (vector,))
    database.commit()
    with (
        pytest.raises(KnowledgeBaseError, match="corrupt knowledge base"),
        open_with(tmp_path / "kb.db", Encoder()) as base,
    ):
        base.search("doctor")
