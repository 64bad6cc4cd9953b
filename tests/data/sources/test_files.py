"""Names are resolved to files in a fixed order; a name without files is an immediate error."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from anarchobot.config.errors import UserError
from anarchobot.data.sources import files
from tests.data.sources.reading import problem, read


def test_missing_file_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UserError, match=r"corpsu\.txt: no such file or folder; did you mean 'corpus\.txt'\?"):
        files.find([str(tmp_path / "corpus.txt"), str(tmp_path / "corpsu.txt")])
    assert problem(tmp_path / "no" / "such.txt").endswith("no such file or folder")


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    assert "expected a .txt, .md, .jsonl (or these with .gz or .zst) or .parquet file" in problem(tmp_path / "a.pdf")


def test_folders_and_globs_are_sorted_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "c/z.txt", "c/a.jsonl", "skipped.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    (tmp_path / "folder.txt").mkdir()
    assert read(tmp_path)[0] == ["a.md", "b.txt", "c/a.jsonl", "c/z.txt"]
    assert read(tmp_path / "*.txt", tmp_path / "*.md")[0] == ["b.txt", "a.md"]
    assert read(tmp_path / "**" / "*.txt")[0] == ["b.txt", "c/z.txt"]
    assert problem(tmp_path / "*.none").endswith(f"matches no {files.EXPECTED}")
    assert problem(tmp_path / "folder.txt").endswith(f"no {files.EXPECTED} in this folder")


def test_existing_file_takes_precedence_over_a_glob(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("one")
    assert read(tmp_path / "a[1].txt")[0] == ["one"]


def test_every_kind_of_file_is_found(tmp_path: Path) -> None:
    kinds = [f"a{plain}{packed}" for plain in (".txt", ".md", ".jsonl") for packed in ("", ".gz", ".zst")]
    for name in (*kinds, "a.parquet", "a.csv", "a.gz", "a.parquet.gz"):
        (tmp_path / name).touch()
    assert {path.name for path in files.find([str(tmp_path)])} == {*kinds, "a.parquet"}
    assert all(files.find([str(tmp_path / name)]) == [tmp_path / name] for name in kinds)
    assert "expected a" in problem(tmp_path / "a.gz")


def test_last_suffix_before_compression_decides_the_format(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl.txt").write_text('{"text": "no row"}')
    (tmp_path / "v1.txt.jsonl.gz").write_bytes(gzip.compress(b'{"text": "row"}'))
    assert read(tmp_path)[0] == ['{"text": "no row"}', "row"]


@pytest.mark.parametrize(("name", "module"), [("a.txt.zst", "backports.zstd"), ("a.parquet", "pyarrow")])
def test_missing_package_is_named_before_reading(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name}: to read .*pip install {module}"):
        files.find([str(tmp_path)])


def test_empty_files_in_folders_and_globs_are_skipped(tmp_path: Path) -> None:
    """Including compressed files and files of blank lines. An empty file that was named itself is an error."""
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.jsonl").write_text("\n \n")
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "d.txt").write_text("text")
    for name in (tmp_path, f"{tmp_path}/*"):
        texts, counts = read(name)
        assert texts == ["text"] and counts.read == 1
        assert counts.details() == [f"empty files skipped: 3 (first: {tmp_path / 'a.txt'})"]
    for name in ("a.txt", "b.jsonl", "c.md.gz"):
        assert problem(tmp_path / "d.txt", tmp_path / name) == f"{tmp_path / name}: the file is empty"
