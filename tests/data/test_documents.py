"""Each way that a file can be wrong is told or counted; what is good comes through unchanged."""

import json
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.documents import CUT_FILE_CHARS, Counts, Document, from_files, open_source
from anarchobot.data.pretokenize import _unique

TEXT = DataConfig()


def read(*names: Path | str, data: DataConfig = TEXT) -> tuple[list[str], Counts]:
    """The texts that are left and their counts, duplicates dropped, as pretokenize sees them."""
    counts = Counts()
    texts = [document.text for document, _ in _unique(from_files(map(str, names), data, counts), counts)]
    assert counts.read == counts.kept + counts.duplicates + counts.filtered + counts.broken
    assert counts.kept == len(texts)
    return texts, counts


def problem(*names: Path | str, data: DataConfig = TEXT) -> str:
    with pytest.raises(UserError) as error:
        read(*names, data=data)
    assert "\n" not in str(error.value)
    return str(error.value)


def jsonl(path: Path, *lines: object) -> Path:
    """Strings and bytes are written as they are, anything else as JSON."""
    raw = (x if isinstance(x, bytes) else (x if isinstance(x, str) else json.dumps(x)).encode() for x in lines)
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


# Text files


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"plain\n", "plain\n"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b"one\r\ntwo\r\n", "one\r\ntwo\r\n"),
        (" größe\u2028\u0085\t".encode(), " größe\u2028\u0085\t"),
    ],
)
def test_a_text_file_is_one_document_without_its_bom_and_else_unchanged(tmp_path: Path, raw: bytes, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    assert read(tmp_path / "a.txt")[0] == [text]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"caf\xe9", "not UTF-8 text (byte 4): convert it first, as with iconv -f latin1"),
        ("text".encode("utf-16"), "iconv -f utf-16"),
        (b"ab\0c", "NUL character (at character 3)"),
        ("text".encode("utf-16-be"), "NUL character (at character 1)"),
    ],
)
def test_what_is_no_text_is_refused_with_the_file_and_the_place(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    message = problem(path)
    assert message.startswith(f"{path}: ") and said in message


def test_a_file_of_white_space_is_counted_as_filtered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\t\n")
    texts, counts = read(tmp_path / "a.txt")
    assert texts == [] and counts.filtered == 1


def test_only_a_long_text_file_may_be_cut(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * CUT_FILE_CHARS)
    (tmp_path / "b.txt").write_text("x" * (CUT_FILE_CHARS - 1))
    jsonl(tmp_path / "c.jsonl", {"text": "x" * CUT_FILE_CHARS})
    assert [d.may_cut for d in from_files([str(tmp_path)], TEXT, Counts())] == [True, False, False]


# Names


def test_a_missing_file_is_told_with_the_nearest_name_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UserError, match=r"corpsu\.txt: no such file or folder; did you mean 'corpus\.txt'\?"):
        from_files([str(tmp_path / "corpus.txt"), str(tmp_path / "corpsu.txt")], TEXT, Counts())
    assert problem(tmp_path / "no" / "such.txt").endswith("no such file or folder")


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    assert "expected a .txt, .md, .jsonl file" in problem(tmp_path / "a.pdf")


def test_folders_and_globs_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c/z.txt", "c/a.jsonl", "skipped.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "folder.txt").mkdir()
    assert read(tmp_path)[0] == ["a.md", "b.txt", "c/a.jsonl", "c/z.txt"]
    assert read(tmp_path / "*.txt", tmp_path / "*.md")[0] == ["b.txt", "a.md"]
    assert read(tmp_path / "**" / "*.txt")[0] == ["b.txt", "c/z.txt"]
    assert problem(tmp_path / "*.none").endswith("matches no .txt, .md, .jsonl file")
    assert problem(tmp_path / "folder.txt").endswith("no .txt, .md, .jsonl file in this folder")


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")
    assert read(tmp_path / "a[1].txt")[0] == ["one"]


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


# JSONL


def test_lines_end_at_byte_0a_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a\u2028b\u2029c\u0085d"}\r\n\n{"text":\r"e"}\n{"text": "f"}'.encode())
    assert read(path)[0] == ["a\u2028b\u2029c\u0085d", "e", "f"]


def test_broken_lines_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "good"},
        "",
        '{"text": "cut off',
        b'{"text": "\xff\xfe"}',
        "[1, 2]",
        {"text": None},
        {"text": ["no", "string"]},
        {"other": "no text"},
        '{"text": "half a pair \\ud800"}',
        "[" * 200_000,
        '{"text": "too long a number", "n": ' + "9" * 5000 + "}",
        {"text": ""},
        {"text": " \n"},
        {"text": "good"},
        {"text": "🙂"},  # written as a pair of surrogates
    )
    texts, counts = read(path)
    assert texts == ["good", "🙂"]
    assert counts.as_manifest() == {"read": 14, "kept": 2, "duplicates": 1, "filtered": 2, "broken": 9}
    assert counts.first_broken == f"{path}:3: not valid JSON: Invalid control character at (character 18)"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "\xff"}', "not UTF-8 (byte 11 of the line)"),
        (b"[1]", "not a JSON object"),
        (b'{"text": 5}', "no text in 'text'"),
        (b'{"text": "\\udead"}', "half of a surrogate pair in 'text'"),
    ],
)
def test_what_is_wrong_with_a_line_is_said(tmp_path: Path, line: bytes, said: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, line)
    assert read(path)[1].first_broken == f"{path}:2: {said}"


def test_a_missing_field_in_the_first_row_is_a_wrong_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "broken", {"title": "t", "content": "c"})
    assert problem(path) == f"{path}:2: no field 'text' (it has content, title): set data.text_field"
    assert read(path, data=DataConfig(text_field="content"))[0] == ["c"]
    data = DataConfig(text_field="content", score_field="score", score_min=0.5)
    assert problem(path, data=data) == f"{path}:2: no field 'score' (it has content, title): set data.score_field"


def test_documents_below_the_score_are_filtered(tmp_path: Path) -> None:
    scores = (0.49, 0.5, 1, -1, float("nan"), float("inf"), None, "0.9", True)
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"t{i}", "score": score} for i, score in enumerate(scores)))
    texts, counts = read(path, data=DataConfig(score_field="score", score_min=0.5))
    assert texts == ["t1", "t2", "t5"]
    assert (counts.filtered, counts.broken) == (3, 3)
    assert counts.first_broken == f"{path}:7: no number in 'score'"
    assert len(read(path)[0]) == len(scores), "without score_field every row is kept"


def test_an_empty_jsonl_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n \r\n")
    assert problem(tmp_path / "a.jsonl").endswith("the file is empty")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    documents = from_files([str(tmp_path / "a.txt")], TEXT, Counts())
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: can't be read: No such file or directory"):
        list(documents)


# Real messy files


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        # By hand from the manifest of faults. 93 lines, of which line 20 is empty. Broken: 12, 26, 36, 54, 57, 66, 93.
        # 47 is white space. 77 repeats 76, and the rows made of one question again (41, 45, 46) repeat its first.
        ("question", {"read": 92, "kept": 81, "duplicates": 3, "filtered": 1, "broken": 7}),
        # The same seven are broken, 41 lacks the field, 45 has null, 46 is empty, 77 repeats 76.
        ("answer", {"read": 92, "kept": 81, "duplicates": 1, "filtered": 1, "broken": 9}),
    ],
)
def test_every_fault_of_the_broken_file_is_counted(shared_data: Path, field: str, expected: dict[str, int]) -> None:
    path = shared_data / "messy" / "made_broken_A.jsonl"
    texts, counts = read(path, data=DataConfig(text_field=field))
    assert counts.as_manifest() == expected
    assert counts.first_broken.startswith(f"{path}:12: not valid JSON")
    assert field == "answer" or max(map(len, texts)) > 1_000_000, "the long row is there"


def test_json_is_taken_and_refused_as_the_standard_says(shared_data: Path, tmp_path: Path) -> None:
    """Each case stands as a value in a row (those over several lines are no JSONL). y_: taken, n_: not, i_: either."""
    path = tmp_path / "a.jsonl"
    for case in sorted((shared_data / "messy" / "json_cases").iterdir()):
        if b"\n" in case.read_bytes():
            continue
        jsonl(path, {"text": "first"}, b'{"text": "second", "case": ' + case.read_bytes() + b"}")
        taken = read(path)[0] == ["first", "second"]
        if not case.name.startswith("i_") and case.name != "n_number_NaN.json":  # Python writes NaN, so it is read
            assert taken == case.name.startswith("y_"), case.name


def test_real_encodings(shared_data: Path) -> None:
    valid = {"arabic", "bulgarian", "english.bom", "french", "spanish"}
    names = set()
    for path in (shared_data / "messy" / "encodings").iterdir():
        names.add(name := path.stem.removeprefix("sample-"))
        if name in valid:
            assert read(path)[0] == [path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()]
        else:
            assert "not UTF-8 text (byte " in problem(path)
    assert len(names) == 9 and valid < names
    assert "iconv -f utf-16 -t utf-8" in problem(shared_data / "messy" / "made_utf16le_bom.txt")
    book = shared_data / "messy" / "crlf_book.md"
    assert read(book)[0][0].encode() == book.read_bytes() and b"\r\n" in book.read_bytes()
