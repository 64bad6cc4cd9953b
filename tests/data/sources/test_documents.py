"""Sources become documents in their order, mixed by weights, measured by quality, and every one of them counted."""

from itertools import islice
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import hub
from anarchobot.data.sources.documents import CUT_FILE_CHARS, Counts, Document, from_files, open_source
from tests.data.sources.reading import TEXT, jsonl, read


def test_a_file_of_white_space_is_counted_as_filtered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\t\n")
    texts, counts = read(tmp_path / "a.txt")
    assert texts == [] and counts.filtered == 1


def test_only_a_long_text_file_may_be_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * CUT_FILE_CHARS)
    (tmp_path / "b.txt").write_text("x" * (CUT_FILE_CHARS - 1))
    jsonl(tmp_path / "c.jsonl", {"text": "x" * CUT_FILE_CHARS})
    assert [d.may_cut for d in from_files([str(tmp_path)], TEXT, Counts())] == [True, False, False]


def test_a_paragraph_is_never_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * CUT_FILE_CHARS)
    data = DataConfig(documents="paragraphs")
    assert [d.may_cut for d in from_files([str(tmp_path)], data, Counts())] == [False]


def test_the_configured_dataset_can_be_a_list_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    names = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    name, documents = open_source(DataConfig(dataset=names), 0, Counts())
    assert (name, [d.text for d in documents]) == (", ".join(names), ["two", "one"])
    name, documents = open_source(DataConfig(dataset=names[0]), 0, Counts())
    assert (name, list(documents)) == (names[0], [Document("two")])


def test_no_dataset_is_told() -> None:
    with pytest.raises(UserError, match=r"data\.dataset is not set"):
        open_source(DataConfig(), 0, Counts())


def test_a_missing_file_falls_back_only_where_the_config_allows_it(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="no such file"):
        open_source(DataConfig(dataset=missing), 0, Counts())
    counts = Counts()
    name, documents = open_source(DataConfig(dataset=missing, fallback="builtin"), 0, counts)
    assert name == "builtin" and next(documents).text
    name, documents = open_source(DataConfig(dataset="builtin"), 0, counts)
    assert name == "builtin" and next(documents).text
    assert counts.read == 2


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    documents = from_files([str(tmp_path / "a.txt")], TEXT, Counts())
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: can't be read: No such file or directory"):
        list(documents)


def test_a_row_of_a_dataset_that_is_no_unicode_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "good"}, {"text": "half a pair \ud800"}, {"text": "größe"}]
    monkeypatch.setattr(hub, "rows", lambda name, data, seed: iter(rows))
    counts = Counts()
    _, documents = open_source(DataConfig(dataset="some/set"), 0, counts)
    assert [document.text for document in documents] == ["good", "größe"]
    assert counts.first_broken == "some/set: row 1: half of a surrogate pair in 'text'"


# Quality


def test_each_reason_to_leave_a_document_out_is_counted(tmp_path: Path) -> None:
    """By hand; lengths count characters, after the clean-up, and the ends of both ranges are kept."""
    rows = [
        ("four", 1),
        ("\0 \r\n", 1),
        ("abc\x07", 1),
        ("größe", 1),
        ("sechs!", 1),
        ("four", 0),
        (" ", 0),
        ("🙂🙂🙂🙂 \t", 1),
    ]
    path = jsonl(tmp_path / "a.jsonl", *({"text": text, "score": score} for text, score in rows), "{")
    data = DataConfig(clean=True, min_chars=4, max_chars=5, score_field="score", score_min=0.5)
    texts, counts = read(path, data=data)
    assert texts == ["four", "größe", "🙂🙂🙂🙂"]
    assert counts.as_manifest() == {"read": 9, "kept": 3, "duplicates": 0, "filtered": 5, "broken": 1}
    assert counts.details() == [
        "filtered: blank 1, low score 2, too long 1, too short 1",
        f"first broken: {path}:9: not valid JSON: unexpected end of data (character 3)",
    ]


def test_text_files_are_cleaned_and_measured_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\0 \r\n\r\ntwo words\r\n")
    assert read(tmp_path / "a.txt", data=DataConfig(clean=True))[0] == ["one\n\ntwo words\n"]
    lines = DataConfig(clean=True, documents="lines", max_chars=3)
    assert read(tmp_path / "a.txt", data=lines)[0] == ["one"]


def test_the_built_in_text_is_measured_too() -> None:
    counts = Counts()
    _, documents = open_source(DataConfig(dataset="builtin", max_chars=2000), 0, counts)
    assert all(len(document.text) <= 2000 for document in islice(documents, 30))
    assert counts.reasons["too long"] == counts.read - 30 > 0


# Mixtures


def test_a_mixture_follows_its_weights_and_ends_with_the_first_source(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", *({"text": f"{i:010d}"} for i in range(100)))
    jsonl(tmp_path / "b.jsonl", *({"text": "ß" * 5 + f"{i:010d}"} for i in range(100)))  # 20 bytes
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    counts = Counts()
    _, documents = open_source(DataConfig(dataset=names, weights=[1, 3]), 0, counts)
    texts = [document.text for document in documents]
    assert texts == [
        document.text for document in open_source(DataConfig(dataset=names, weights=[1, 3]), 0, Counts())[1]
    ]
    given = {10: 0, 20: 0}
    for text in texts:
        given[len(text.encode())] += len(text.encode())
        assert abs(given[20] - 3 * given[10]) <= 80, "a document of either is 20 bytes, in fourths"
    assert given == {10: 670, 20: 2000}, "b has run out"
    assert [(used.name, used.documents, used.bytes) for used in counts.used] == [
        (names[0], 67, 670),
        (names[1], 100, 2000),
    ]
    assert counts.read == 167, "no document is drawn that isn't used"
    assert counts.details() == [
        f"used of {names[0]}: 67 documents, 0.00 MB (25.1%)",
        f"used of {names[1]}: 100 documents, 0.00 MB (74.9%)",
    ]


def test_a_mixture_counts_only_what_it_read_of_each_source(tmp_path: Path) -> None:
    """The rows that no turn came to are not read: by hand, a gives 1 and 3 around a broken and a blank one."""
    jsonl(tmp_path / "a.jsonl", {"text": "a1"}, "{", {"text": " "}, {"text": "a3"}, {"text": "a4"}, {"text": "a5"})
    jsonl(tmp_path / "b.jsonl", {"text": "b1"}, {"text": "b2"})
    counts = Counts()
    data = DataConfig(dataset=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], weights=[1, 1])
    assert [document.text for document in open_source(data, 0, counts)[1]] == ["a1", "b1", "a3", "b2", "a4"]
    assert (counts.read, counts.filtered, counts.broken) == (7, 1, 1)


def test_hub_names_files_and_the_built_in_text_stand_in_one_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "rows", lambda name, data, seed: iter([{"text": f"{name} {i}"} for i in range(2)]))
    (tmp_path / "a.txt").write_text("a file")
    names = ["some/set", str(tmp_path / "a.txt"), "other/set", "builtin"]
    counts = Counts()
    name, documents = open_source(DataConfig(dataset=names), 0, counts)
    assert name == ", ".join(names)
    first = [next(documents).text for _ in range(6)]
    assert first[:5] == ["some/set 0", "some/set 1", "a file", "other/set 0", "other/set 1"] and len(first[5]) > 1000
    mixed = open_source(DataConfig(dataset=names[:3], weights=[1, 1, 1]), 0, counts)[1]
    assert [document.text for document in mixed] == ["some/set 0", "a file", "other/set 0"]
