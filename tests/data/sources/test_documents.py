"""Documents come in order, mixed by weights, cleaned and filtered, and every one is counted."""

import unicodedata
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import hub
from anarchobot.data.sources.documents import (
    SPLIT_FILE_CHARS,
    Document,
    DocumentCounts,
    clean_text,
    filter_reason,
    from_files,
    mix_by_weight,
    open_source,
)
from tests.data.sources.reading import TEXT, jsonl, read


def test_blank_file_is_filtered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\t\n")
    texts, counts = read(tmp_path / "a.txt")
    assert texts == [] and counts.filtered == 1


def test_only_long_text_files_are_splittable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * SPLIT_FILE_CHARS)
    (tmp_path / "b.txt").write_text("x" * (SPLIT_FILE_CHARS - 1))
    jsonl(tmp_path / "c.jsonl", {"text": "x" * SPLIT_FILE_CHARS})
    assert [d.splittable for d in from_files([str(tmp_path)], TEXT, DocumentCounts())] == [True, False, False]


def test_paragraphs_are_not_splittable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * SPLIT_FILE_CHARS)
    data = DataConfig(documents="paragraphs")
    assert [d.splittable for d in from_files([str(tmp_path)], data, DocumentCounts())] == [False]


def test_dataset_can_be_a_list_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    names = [str(tmp_path / "b.txt"), str(tmp_path / "a.txt")]
    name, documents = open_source(DataConfig(dataset=names), 0, DocumentCounts())
    assert (name, [d.text for d in documents]) == (", ".join(names), ["two", "one"])
    name, documents = open_source(DataConfig(dataset=names[0]), 0, DocumentCounts())
    assert (name, list(documents)) == (names[0], [Document("two")])


def test_missing_dataset_is_an_error() -> None:
    with pytest.raises(UserError, match=r"data\.dataset is not set"):
        open_source(DataConfig(), 0, DocumentCounts())


def test_fallback_must_be_enabled(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.txt")
    with pytest.raises(UserError, match="no such file"):
        open_source(DataConfig(dataset=missing), 0, DocumentCounts())
    counts = DocumentCounts()
    name, documents = open_source(DataConfig(dataset=missing, fallback="builtin"), 0, counts)
    assert name == "builtin" and next(documents).text
    name, documents = open_source(DataConfig(dataset="builtin"), 0, counts)
    assert name == "builtin" and next(documents).text
    assert counts.read == 2


def test_unreadable_file_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    documents = from_files([str(tmp_path / "a.txt")], TEXT, DocumentCounts())
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: can't be read: No such file or directory"):
        list(documents)


def test_unpaired_surrogate_is_a_broken_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "good"}, {"text": "half a pair \ud800"}, {"text": "größe"}]
    monkeypatch.setattr(hub, "rows", lambda name, data, seed: iter(rows))
    counts = DocumentCounts()
    _, documents = open_source(DataConfig(dataset="some/set"), 0, counts)
    assert [document.text for document in documents] == ["good", "größe"]
    assert counts.first_broken == "some/set: row 1: unpaired surrogate in 'text'"


# Cleaning and filtering


def test_each_filter_reason_is_counted(tmp_path: Path) -> None:
    """By hand. Lengths are in characters, after cleaning; both bounds are inclusive."""
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


def test_text_files_are_cleaned_and_filtered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\0 \r\n\r\ntwo words\r\n")
    assert read(tmp_path / "a.txt", data=DataConfig(clean=True))[0] == ["one\n\ntwo words\n"]
    lines = DataConfig(clean=True, documents="lines", max_chars=3)
    assert read(tmp_path / "a.txt", data=lines)[0] == ["one"]


def test_builtin_text_is_filtered() -> None:
    counts = DocumentCounts()
    _, documents = open_source(DataConfig(dataset="builtin", max_chars=2000), 0, counts)
    assert all(len(document.text) <= 2000 for document in islice(documents, 30))
    assert counts.reasons["too long"] == counts.read - 30 > 0


# Mixtures


def test_mixture_follows_its_weights(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", *({"text": f"{i:010d}"} for i in range(100)))
    jsonl(tmp_path / "b.jsonl", *({"text": "ß" * 5 + f"{i:010d}"} for i in range(100)))  # 20 bytes
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    counts = DocumentCounts()
    _, documents = open_source(DataConfig(dataset=names, weights=[1, 3]), 0, counts)
    texts = [document.text for document in documents]
    assert texts == [
        document.text for document in open_source(DataConfig(dataset=names, weights=[1, 3]), 0, DocumentCounts())[1]
    ]
    given = {10: 0, 20: 0}
    for text in texts:
        given[len(text.encode())] += len(text.encode())
        assert abs(given[20] - 3 * given[10]) <= 80, "at most one document, 20 bytes, in quarters"
    assert given == {10: 670, 20: 2000}, "b has run out"
    assert [(used.name, used.documents, used.bytes) for used in counts.used] == [
        (names[0], 67, 670),
        (names[1], 100, 2000),
    ]
    assert counts.read == 167, "no document is read without being used"
    assert counts.details() == [
        f"from {names[0]}: 67 documents, 0.00 MB (25.1%)",
        f"from {names[1]}: 100 documents, 0.00 MB (74.9%)",
    ]


def test_mixture_counts_only_what_it_read(tmp_path: Path) -> None:
    """By hand: file a yields a1, a3 and a4, and its last row is never read."""
    jsonl(tmp_path / "a.jsonl", {"text": "a1"}, "{", {"text": " "}, {"text": "a3"}, {"text": "a4"}, {"text": "a5"})
    jsonl(tmp_path / "b.jsonl", {"text": "b1"}, {"text": "b2"})
    counts = DocumentCounts()
    data = DataConfig(dataset=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], weights=[1, 1])
    assert [document.text for document in open_source(data, 0, counts)[1]] == ["a1", "b1", "a3", "b2", "a4"]
    assert (counts.read, counts.filtered, counts.broken) == (7, 1, 1)


def test_hub_names_files_and_builtin_can_be_listed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "rows", lambda name, data, seed: iter([{"text": f"{name} {i}"} for i in range(2)]))
    (tmp_path / "a.txt").write_text("a file")
    names = ["some/set", str(tmp_path / "a.txt"), "other/set", "builtin"]
    counts = DocumentCounts()
    name, documents = open_source(DataConfig(dataset=names), 0, counts)
    assert name == ", ".join(names)
    first = [next(documents).text for _ in range(6)]
    assert first[:5] == ["some/set 0", "some/set 1", "a file", "other/set 0", "other/set 1"] and len(first[5]) > 1000
    mixed = open_source(DataConfig(dataset=names[:3], weights=[1, 1, 1]), 0, counts)[1]
    assert [document.text for document in mixed] == ["some/set 0", "a file", "other/set 0"]


@given(st.lists(st.tuples(st.floats(0.01, 100), st.lists(st.integers(1, 50), max_size=80)), min_size=1, max_size=4))
def test_mix_by_weight_follows_the_weights(sources: list[tuple[float, list[int]]]) -> None:
    """Items are their own sizes. No source is ahead of its share by more than one item."""
    weights, items = [weight for weight, _ in sources], [sizes for _, sizes in sources]
    drawn = [0] * len(sources)

    def draw(i: int) -> Iterator[int]:
        for size in items[i]:
            drawn[i] += 1
            yield size

    sums, seen = [0] * len(sources), [0] * len(sources)
    for i, size, item in mix_by_weight([draw(i) for i in range(len(sources))], weights, lambda size: size):
        assert size == item == items[i][seen[i]], "each source keeps its order"
        seen[i] += 1
        sums[i] += size
        shares = [sum(sums) * weight / sum(weights) for weight in weights]
        assert all(had <= share + 50 for had, share in zip(sums, shares, strict=True))
        assert drawn == seen
    assert any(drawn[i] == len(items[i]) for i in range(len(sources)))


def test_mix_by_weight_ends_with_the_first_exhausted_source() -> None:
    given_out = [item for _, _, item in mix_by_weight([iter(["a", "b"]), iter(["c"])], [1, 1], len)]
    assert given_out == ["a", "c", "b"]


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
def test_clean_text(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_clean_removes_the_license_of_gutenberg(tmp_path: Path) -> None:
    start, end = (
        f"*** {word} OF THIS PROJECT GUTENBERG EBOOK BOTCHAN\n(MASTER DARLING) ***" for word in ("START", "END")
    )
    book = f"The Project Gutenberg EBook\n{start}\n\n\nCHAPTER I\n\nText *** more\n\n{end}\nLicense\n"
    body = "CHAPTER I\n\nText *** more\n"
    (tmp_path / "a.txt").write_text(book)
    (tmp_path / "b.txt").write_text(f"{end}\nreversed\n{start}\n")
    texts, counts = read(tmp_path, data=DataConfig(clean=True))
    assert texts == [body, f"{end}\nreversed\n{start}\n"]
    assert (counts.gutenberg, counts.gutenberg_bytes) == (1, len(book) - len(body))
    assert read(tmp_path)[0][0] == book


@given(st.text(alphabet=st.one_of(st.sampled_from("\r\n\t \x0b\x0c\x1c\x85\xa0\u2028ab\0"), st.characters())))
def test_clean_text_matches_the_unicode_tables(text: str) -> None:
    """Line ends first, then characters by category; a second pass changes nothing."""
    text_of_lines = text.replace("\r\n", "\n")
    for end in "\r\x0b\x0c\x85":
        text_of_lines = text_of_lines.replace(end, "\n")
    kept = "".join(c for c in text_of_lines if c in "\n\t" or unicodedata.category(c) != "Cc")
    assert clean_text(text) == "\n".join(line.rstrip() for line in kept.split("\n"))
    assert clean_text(clean_text(text)) == clean_text(text)


def test_long_whitespace_is_cleaned_in_linear_time() -> None:
    """A backtracking pattern would take hours."""
    assert clean_text((" " * 1_000_000 + "x") * 3) == (" " * 1_000_000 + "x") * 3


def test_naughty_strings_lose_only_controls_and_whitespace(shared_data: Path) -> None:
    text = (shared_data / "messy" / "blns.txt").read_bytes().decode()
    lost = set(text) - set(clean_text(text))
    assert lost and all(unicodedata.category(c) == "Cc" or c.isspace() for c in lost)


@pytest.mark.parametrize(
    ("text", "why"),
    [("", "blank"), (" \u3000\n", "blank"), ("abc", "too short"), ("abcd", ""), ("äöü🙂ß", ""), ("sechs!", "too long")],
)
def test_filter_reason(text: str, why: str) -> None:
    assert filter_reason(text, DataConfig(min_chars=4, max_chars=5)) == why
