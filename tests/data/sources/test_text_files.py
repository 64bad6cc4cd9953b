"""Text files as whole files, paragraphs or lines; text that is not UTF-8 is refused or counted."""

import re
import tracemalloc
from pathlib import Path

import pytest

from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import text_files
from anarchobot.data.sources.files import FileRange
from tests.data.sources.reading import problem, read

PARAGRAPHS = DataConfig(documents="paragraphs")
LINES = DataConfig(documents="lines")


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"plain\n", "plain\n"),
        (b"\xef\xbb\xbfwith a mark", "with a mark"),
        (b"one\r\ntwo\r\n", "one\r\ntwo\r\n"),
        (" größe\u2028\u0085\t".encode(), " größe\u2028\u0085\t"),
    ],
)
def test_file_is_one_document_without_its_bom(tmp_path: Path, raw: bytes, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(raw)
    assert read(tmp_path / "a.txt")[0] == [text]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"caf\xe9", "not UTF-8 text (byte 4): convert it first, for example with iconv -f latin1"),
        ("text".encode("utf-16"), "iconv -f utf-16"),
        (b"ab\0c", "NUL character (at character 3)"),
        ("text".encode("utf-16-be"), "NUL character (at character 1)"),
    ],
)
def test_files_that_are_not_text_are_refused(tmp_path: Path, raw: bytes, expected: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    message = problem(path)
    assert message.startswith(f"{path}: ") and expected in message


@pytest.mark.parametrize("data", [DataConfig(), PARAGRAPHS])
def test_files_that_are_not_text_are_counted_in_a_folder(tmp_path: Path, data: DataConfig) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n\nok\n")
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.md").write_bytes("text".encode("utf-16"))
    texts, counts = read(tmp_path, data=data)
    assert (texts, counts.read, counts.broken) == (["good"], 1, 0)
    assert [path for path, _ in counts.unread] == [str(tmp_path / name) for name in ("a.txt", "c.md")]
    for name, encoding in (("a.txt", "latin1"), ("c.md", "utf-16")):
        (line,) = [line for line in counts.details() if f"iconv -f {encoding} -t utf-8" in line]
        assert line.endswith(f"not read: 1 ({tmp_path / name})")


def test_files_whose_lines_are_documents_are_refused_in_a_folder(tmp_path: Path) -> None:
    """Another process may read the end of the same file."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\nok\n")
    assert "not UTF-8 text (byte 4)" in problem(tmp_path, data=LINES)


def test_paragraphs_are_separated_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n\none\ntwo \n\n \t\r\nthree\r\n  four\r\n\r\n\u3000\n\x0c\nfive\u2028six".encode())
    texts, counts = read(path, data=PARAGRAPHS)
    assert texts == ["one\ntwo ", "three\r\n  four", "five\u2028six"]
    assert counts.reasons == {"blank": 1}, "a line of non-ASCII whitespace is a document, but filtered"


def test_lines_are_documents_without_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\n two \n \t\nthree\rfour\n\xc2\x85\nfive")
    texts, counts = read(path, data=LINES)
    assert texts == ["one", " two ", "three\rfour", "five"]
    assert counts.read == 5


@pytest.mark.parametrize("data", [PARAGRAPHS, LINES])
def test_bad_line_is_one_broken_document_unless_it_is_the_first(tmp_path: Path, data: DataConfig) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\ncaf\xe9\n\nnul\0\n\ngood too\n")
    texts, counts = read(path, data=data)
    assert (texts, counts.broken) == (["good", "good too"], 2)
    assert counts.first_broken.startswith(f"{path}:3: not UTF-8 text (byte 4)")
    path.write_bytes("all of it\n\nin UTF-16\n".encode("utf-16"))
    assert "with iconv -f utf-16" in problem(path, data=data)


@pytest.mark.parametrize("data", [PARAGRAPHS, LINES])
def test_file_without_documents_is_an_error(tmp_path: Path, data: DataConfig) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n \n")
    assert problem(tmp_path / "a.txt", data=data).endswith("the file is empty")


@pytest.mark.parametrize("data", [PARAGRAPHS, LINES])
def test_lines_and_paragraphs_are_streamed(tmp_path: Path, data: DataConfig) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a line of a paragraph of two\nand its end\n\n" * 100_000)  # 4.2 MB
    tracemalloc.start()
    number = sum(1 for _ in text_files.read_texts(FileRange(path), data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == (200_000 if data is LINES else 100_000)
    assert peak < 500_000


def test_paragraphs_and_lines_of_a_real_book(shared_data: Path) -> None:
    path = shared_data / "text" / "books" / "pride_and_prejudice.txt"
    book = path.read_text(encoding="utf-8")
    counts = read(path, data=PARAGRAPHS)[1]
    assert counts.read == len(re.split(r"\n(?:[ \t]*\n)+", book.strip())) > 2000
    assert read(path, data=LINES)[1].read == len([line for line in book.split("\n") if line.strip()])


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
