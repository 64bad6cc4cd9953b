"""JSONL rows and their fields: valid text is unchanged, every fault is counted and located."""

from pathlib import Path

import pytest

from anarchobot.config.schema import DataConfig
from tests.data.sources.reading import jsonl, problem, read


def test_lines_end_only_at_byte_0a(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "a\u2028b\u2029c\u0085d"}\r\n\n{"text":\r"e"}\n{"text": "f"}'.encode())
    assert read(path)[0] == ["a\u2028b\u2029c\u0085d", "e", "f"]


def test_broken_lines_are_counted_and_the_first_is_reported(tmp_path: Path) -> None:
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
    assert counts.first_broken == f"{path}:3: not valid JSON: unexpected control character in string (character 18)"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8 (byte 11 of the line)"),
        (b"[1]", "not a JSON object"),
        (b'{"text": 5}', "no text in 'text'"),
        (b'{"text": null}', "'text' is null"),
        (b'{"text": "\\udead"}', "not valid JSON: invalid high surrogate in string (character 11)"),
    ],
)
def test_reason_of_a_broken_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, line)
    assert read(path)[1].first_broken == f"{path}:2: {reason}"


def test_missing_field_in_the_first_row_is_an_error(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", "broken", {"title": "t", "content": "c"})
    assert problem(path) == f"{path}:2: no field 'text' (it has content, title): set data.text_field"
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"messages": []}')
    assert "--chat" in problem(chats) and "--dataset" in problem(chats)
    assert read(path, data=DataConfig(text_field="content"))[0] == ["c"]
    data = DataConfig(text_field="content", score_field="score", score_min=0.5)
    assert problem(path, data=data) == f"{path}:2: no field 'score' (it has content, title): set data.score_field"


def test_documents_below_the_score_are_filtered(tmp_path: Path) -> None:
    scores = (0.49, 0.5, 1, -1, 1e300, None, "0.9", True)
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"t{i}", "score": score} for i, score in enumerate(scores)))
    texts, counts = read(path, data=DataConfig(score_field="score", score_min=0.5))
    assert texts == ["t1", "t2", "t4"]
    assert (counts.filtered, counts.broken) == (2, 3)
    assert counts.first_broken == f"{path}:6: no number in 'score'"
    assert len(read(path)[0]) == len(scores), "without score_field every row is kept"


def test_empty_jsonl_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n \r\n")
    assert problem(tmp_path / "a.jsonl").endswith("the file is empty")


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        # By hand, from the list of faults: 93 lines, line 20 is empty. Broken: 12, 26, 36, 54, 57, 66, 93.
        # 47 is whitespace. 77 repeats 76, and 41, 45 and 46 repeat an earlier question.
        ("question", {"read": 92, "kept": 81, "duplicates": 3, "filtered": 1, "broken": 7}),
        # The same seven are broken; 41 lacks the field, 45 has null, 46 is empty, 77 repeats 76.
        ("answer", {"read": 92, "kept": 81, "duplicates": 1, "filtered": 1, "broken": 9}),
    ],
)
def test_every_fault_of_a_broken_file_is_counted(shared_data: Path, field: str, expected: dict[str, int]) -> None:
    path = shared_data / "messy" / "made_broken_A.jsonl"
    texts, counts = read(path, data=DataConfig(text_field=field))
    assert counts.as_manifest() == expected
    assert counts.first_broken.startswith(f"{path}:12: not valid JSON")
    assert field == "answer" or max(map(len, texts)) > 1_000_000, "the long row is kept"


def test_json_conformance(shared_data: Path, tmp_path: Path) -> None:
    """Each case is a value in a row (multi-line cases are not JSONL). y_: accepted, n_: rejected, i_: either."""
    path = tmp_path / "a.jsonl"
    for case in sorted((shared_data / "messy" / "json_cases").iterdir()):
        if b"\n" in case.read_bytes():
            continue
        jsonl(path, {"text": "first"}, b'{"text": "second", "case": ' + case.read_bytes() + b"}")
        accepted = read(path)[0] == ["first", "second"]
        if not case.name.startswith("i_") and case.name != "n_number_NaN.json":  # Python writes NaN, so it is accepted
            assert accepted == case.name.startswith("y_"), case.name
