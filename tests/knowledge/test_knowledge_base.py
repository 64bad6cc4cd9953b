"""KnowledgeBase: atomic documents with stable passage ids; BM25 and votes checked against independent computations."""

import gzip
import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources.documents import DocumentCounts
from anarchobot.knowledge import retrieval
from anarchobot.knowledge.knowledge_base import KnowledgeBase
from anarchobot.knowledge.text import search_terms
from tests.knowledge.bases import add, make_base, open_base, write_rows

FRUIT = ["apples are red and round", "bananas are long and yellow", "cherries are small and red and round"]


def ids(base: KnowledgeBase, question: str, k: int = 100) -> list[int]:
    return [hit.passage_id for hit in base.search(question, k)]


def vote_log(path: Path) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as database:
        rows = database.execute("SELECT * FROM feedback ORDER BY id").fetchall()
    database.close()
    return rows


# --- Search


def test_search_returns_at_most_k(tmp_path: Path) -> None:
    texts = [f"common word number{i}" for i in range(9)]
    with make_base(tmp_path, texts, retrieval_k=2) as base:
        assert len(base.search("a common word")) == 2
        assert len(base.search("a common word", 5)) == 5
        assert [hit.text for hit in base.search("number7")] == [texts[7]]
        assert base.search("nothing of that") == base.search("") == base.search('"*" -') == []


def test_a_hit_has_its_source(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# Pears\n\nPears are green.\n")
    with make_base(tmp_path, FRUIT) as base:
        add(base, tmp_path / "notes.md")
        (hit,) = base.search("green pears")
        assert (hit.text, hit.source) == ("# Pears\n\nPears are green.\n", str(tmp_path / "notes.md"))
        assert base.search("yellow")[0].source == f"{tmp_path / 'texts.jsonl'}:2"


def test_scores_are_textbook_bm25(tmp_path: Path) -> None:
    """Robertson's BM25 with k1 1.2, b 0.75, idf ln((N - n + 0.5) / (n + 0.5)), in float64."""
    draw = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(40)]
    share = 1 / np.arange(1, 41) / np.sum(1 / np.arange(1, 41))
    texts = [list(draw.choice(vocabulary, size=draw.integers(3, 60), p=share)) for _ in range(80)]
    lengths = np.array([len(text) for text in texts])
    with make_base(tmp_path, [" ".join(text) for text in texts]) as base:
        for _ in range(20):
            question = list(dict.fromkeys(draw.choice(vocabulary, size=4, p=share)))
            bm25 = np.zeros(len(texts))
            for word in question:
                tf = np.array([text.count(word) for text in texts])
                n = np.count_nonzero(tf)
                idf = max(np.log((len(texts) - n + 0.5) / (n + 0.5)), 1e-6)  # FTS5's floor
                bm25 += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * lengths / lengths.mean()))
            hits = base.search(" ".join(question), 100)
            found = {hit.passage_id - 1: hit.score for hit in hits}
            assert set(found) == set(np.flatnonzero(bm25))
            assert np.allclose([found[i] for i in found], bm25[list(found)] / bm25.max(), rtol=1e-9)
            assert [hit.score for hit in hits] == sorted(found.values(), reverse=True)


def test_the_most_common_terms_are_dropped_above_the_match_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "MAX_MATCHES", 10)
    assert retrieval.fts_query({"the": 11, "rare": 2, "some": 8, "none": 0}) == '"rare" OR "some"'
    assert retrieval.fts_query({"the": 11}) == '"the"'
    assert retrieval.fts_query({"none": 0}) == retrieval.fts_query({}) == ""


def test_suffixes_accents_and_case_are_ignored(tmp_path: Path) -> None:
    with make_base(tmp_path, ["Two helicopters landed.", "Le café est fermé."]) as base:
        assert ids(base, "HELICOPTER") == [1]
        assert ids(base, "cafe ferme") == [2]


HOSTILE = [
    "'; DROP TABLE passages; --", '" OR 1=1 --', "apples OR", "NOT NOT", "NEAR(", "a NEAR/2 b", "^apples",
    "text:apples", "{text}: apples", "apples*", '"apples', "apples + red", "(((", "-", "apples\0bananas",
    "\udcff apples", "x" * 100_000, "why " * 50_000, "東" * 5000, " ".join(f"w{i}" for i in range(5000)),
]  # fmt: skip


@pytest.mark.parametrize("question", HOSTILE, ids=range(len(HOSTILE)))
def test_sql_and_fts_syntax_is_plain_text(tmp_path: Path, question: str) -> None:
    with make_base(tmp_path, FRUIT) as base:
        assert ids(base, question) in ([], [1], [1, 3], [1, 2])
        assert (1 in ids(base, question)) == ("apples" in question)
        base.feedback(question, [1], 1.0)
        assert ids(base, "yellow") == [2]
        text = question.encode(errors="replace").decode()
        add(base, write_rows(tmp_path / "hostile.jsonl", [text]))
        stored = base._database.execute("SELECT text FROM passages WHERE id > 3 ORDER BY id").fetchall()
        assert "".join(passage for (passage,) in stored) == text
        assert base.remove(str(tmp_path / "hostile.jsonl")) == len(stored)


def test_naughty_strings_are_stored_and_find_themselves(shared_data: Path, tmp_path: Path) -> None:
    strings = [s for s in json.loads((shared_data / "messy/blns.json").read_text(encoding="utf-8")) if s.strip()]
    with make_base(tmp_path, strings) as base:
        stored = base._database.execute("SELECT text FROM passages ORDER BY id").fetchall()
        assert "".join(text for (text,) in stored) == "".join(strings)
        for string in strings:
            found = "".join(hit.text for hit in base.search(string, 1000))
            assert not search_terms(string) or string[:1000] in found or len(string) > 1000


# --- Documents


def test_unchanged_files_are_skipped_and_changed_files_replaced(tmp_path: Path) -> None:
    with make_base(tmp_path, FRUIT) as base:
        path = tmp_path / "texts.jsonl"
        assert add(base, path) == "equal"
        other = write_rows(tmp_path / "other.jsonl", ["dates are brown"])
        assert add(base, other) == "added"
        assert ids(base, "dates") == [4]
        # The first text is deleted, the second kept, a new one added.
        assert add(base, write_rows(path, [FRUIT[1], "elderberries are black", FRUIT[2]])) == "replaced"
        assert ids(base, "apples") == []
        assert ids(base, "bananas") == [2]
        assert ids(base, "cherries") == [3]
        assert ids(base, "dates") == [4]
        assert ids(base, "elderberries") == [5]
        assert [hit.source for hit in base.search("bananas")] == [f"{path}:1"]
        assert [(document.name, document.passages) for document in base.documents()] == [
            (str(other), 1),
            (str(path), 3),
        ]


def test_another_text_field_replaces_the_document(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "apples", "title": "bananas"}\n')
    with open_base(tmp_path / "kb.db") as base:
        assert add(base, path) == "added"
        assert base.add(path, DataConfig(text_field="title"), DocumentCounts()) == "replaced"
        assert (ids(base, "apples"), ids(base, "bananas")) == ([], [2])


def test_ids_of_a_removed_document_are_never_reused(tmp_path: Path) -> None:
    with make_base(tmp_path, FRUIT) as base:
        assert base.remove(str(tmp_path / "texts.jsonl")) == 3
        assert base.documents() == []
        assert ids(base, "red") == []
        add(base, tmp_path / "texts.jsonl")
        assert ids(base, "bananas") == [5]
        with pytest.raises(UserError, match=r"no document 'textz\.jsonl'"):
            base.remove("textz.jsonl")


def test_broken_and_blank_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "apples"}\n{"text": " "}\n{broken\n{"text": 3}\n{"text": "pears"}\n')
    counts = DocumentCounts()
    with open_base(tmp_path / "kb.db") as base:
        assert base.add(path, DataConfig(), counts) == "added"
        assert counts.as_manifest() == {"read": 5, "kept": 2, "duplicates": 0, "filtered": 1, "broken": 2}
        assert [hit.source for hit in base.search("pears")] == [f"{path}:5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "a.txt: not UTF-8 text"),
        ("a.txt", b"a\0b", "a.txt: not text: "),
        ("a.txt", b" \n", "a.txt: no text to add: filtered: blank 1"),
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1: no field 'text'"),
        ("a.jsonl", b"not json\n", "a.jsonl: no text to add: first broken: a.jsonl:1: not valid JSON"),
    ],
)
def test_unsupported_files_are_rejected_without_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with make_base(Path(), FRUIT) as base:
        Path(name).write_bytes(b"apples and pears" if name.endswith("txt") else b'{"text": "apples and pears"}\n')
        add(base, Path(name))
        before = base.documents(), ids(base, "apples pears")
        Path(name).write_bytes(content)
        with pytest.raises(UserError) as error:
            add(base, Path(name))
        assert str(error.value).startswith(message)
        assert (base.documents(), ids(base, "apples pears")) == before


def test_compressed_files_and_parquet(tmp_path: Path) -> None:
    compressed, table = tmp_path / "notes.txt.gz", tmp_path / "rows.parquet"
    compressed.write_bytes(gzip.compress(b"Apples are red."))
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table({"text": ["Bananas are yellow.", "Figs."]}), table)
    with open_base(tmp_path / "kb.db") as base:
        assert [add(base, compressed), add(base, table)] == ["added", "added"]
        assert [(hit.text, hit.source) for hit in base.search("figs")] == [("Figs.", f"{table}: row 1")]
        assert [(hit.text, hit.source) for hit in base.search("apples")] == [("Apples are red.", str(compressed))]


def test_unprintable_file_names_are_rejected(tmp_path: Path) -> None:
    with open_base(tmp_path / "kb.db") as base:
        for name in ("a\udcff.txt", "a\n.txt"):
            with pytest.raises(UserError, match=r"\.txt: the file name has unprintable characters"):
                add(base, Path(name))


# --- Feedback


def test_feedback_changes_the_ranking(tmp_path: Path) -> None:
    with make_base(tmp_path, FRUIT) as base:
        assert ids(base, "what is red and round?") == [1, 3, 2]
        base.feedback("what is red and round?", [1], -1.0)
        base.feedback("what is red and round?", [3], 1.0)
        assert ids(base, "what is red and round?") == [3, 1, 2]
        for _ in range(2):
            base.feedback("what is red and round?", [1], 1.0)
            base.feedback("what is red and round?", [3], -1.0)
        assert ids(base, "what is red and round?") == [1, 3, 2]
        assert [document.votes for document in base.documents()] == [6]


def test_alpha_scales_the_effect_of_a_vote(tmp_path: Path) -> None:
    question = "what is red and round?"
    with make_base(tmp_path, FRUIT) as base:
        plain = {hit.passage_id: hit.score for hit in base.search(question)}
        for _ in range(3):
            base.feedback(question, [1], -1.0)
    for alpha, s in ((0.0, 0.0), (0.1, 0.9**3 - 1), (0.5, 0.5**3 - 1), (1.0, -1.0)):
        with open_base(tmp_path / "kb.db", feedback_alpha=alpha) as base:
            scores = {hit.passage_id: hit.score for hit in base.search(question)}
            assert scores[1] == pytest.approx(plain[1] * (1 + s))
            assert (scores[2], scores[3]) == (plain[2], plain[3])
            assert base.relevances(question, [1, 2]) == pytest.approx({1: s, 2: 0})


def test_replaying_the_log_gives_the_same_scores(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    questions = ["what is red?", "what is round and red?", "is anything yellow?", "red bananas"]
    with make_base(tmp_path, FRUIT) as base:
        for _ in range(50):
            base.feedback(str(draw.choice(questions)), [int(draw.integers(1, 4))], float(draw.choice([1.0, -1.0])))
        scores = [base.search(question) for question in questions]
    again = tmp_path / "again"
    again.mkdir()
    with make_base(again, FRUIT) as base:
        for _, _, question, passage, reward in vote_log(tmp_path / "kb.db"):
            base.feedback(question, [passage], reward)  # type: ignore[arg-type,list-item]
        replayed = [base.search(question) for question in questions]
    assert [[(h.passage_id, h.score) for h in hits] for hits in replayed] == [
        [(h.passage_id, h.score) for h in hits] for hits in scores
    ]


def test_the_vote_log_is_append_only(tmp_path: Path) -> None:
    with make_base(tmp_path, FRUIT) as base:
        base.feedback("red", [1, 3, 1], 1.0)
        base.remove(str(tmp_path / "texts.jsonl"))
        with pytest.raises(UserError, match="no passage 1;"):
            base.feedback("red", [1], 1.0)
    log = vote_log(tmp_path / "kb.db")
    assert [row[2:] for row in log] == [("red", 1, 1.0), ("red", 3, 1.0)]
    with sqlite3.connect(tmp_path / "kb.db") as database:
        for change in ("DELETE FROM feedback", "UPDATE feedback SET reward = -1"):
            with pytest.raises(sqlite3.IntegrityError, match="feedback is append-only"):
                database.execute(change)
    database.close()
    with open_base(tmp_path / "kb.db") as base:
        add(base, tmp_path / "texts.jsonl")
        assert base.relevances("red", [4, 6]) == {4: 0, 6: 0}


@pytest.mark.parametrize("passage", [0, -1, 4, 2**63, 10**30])
def test_voting_on_a_missing_passage_is_an_error(tmp_path: Path, passage: int) -> None:
    with make_base(tmp_path, FRUIT) as base:
        with pytest.raises(UserError, match=f"no passage {passage};"):
            base.feedback("red", [1, passage], 1.0)
        with pytest.raises(ValueError, match=r"expected 1\.0 or -1\.0"):
            base.feedback("red", [1], 0.5)
    assert vote_log(tmp_path / "kb.db") == []
