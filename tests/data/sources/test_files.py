"""Names are resolved to files in a fixed order; a name without files is an immediate error."""

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import files, hub
from anarchobot.data.sources.documents import SPLIT_FILE_CHARS, DocumentCounts, from_files, from_ranges
from tests.data.sources.reading import problem, read


def test_missing_file_is_an_error_with_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(UserError, match=r"corpsu\.txt: no such file or folder; did you mean 'corpus\.txt'\?"):
        files.find([str(tmp_path / "corpus.txt"), str(tmp_path / "corpsu.txt")])
    assert problem(tmp_path / "no" / "such.txt").endswith("no such file or folder")


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.odt").write_text("x")
    assert f"expected a {files.EXPECTED}" in problem(tmp_path / "a.odt")


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


def write(folder: Path, *names: str) -> Path:
    """Writes files whose text is their name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return folder


def test_hidden_and_system_files_are_named_not_read(tmp_path: Path) -> None:
    """Hidden folders are named once, whatever they contain. The folder itself may be hidden, and files may be named."""
    root = write(
        tmp_path / ".data", "a.txt", "._a.txt", ".b.txt", "c/d.txt", "c/._d.txt", "__MACOSX/c/e.txt",
        ".ipynb_checkpoints/f.txt", ".ipynb_checkpoints/g.txt", "$RECYCLE.BIN/h.txt", "c/@eaDir/i.txt",
    )  # fmt: skip
    texts, counts = read(root)
    assert texts == ["a.txt", "c/d.txt"] and counts.read == 2
    hidden = [".b.txt", ".ipynb_checkpoints", "._a.txt", "__MACOSX", "c/._d.txt", "$RECYCLE.BIN", "c/@eaDir"]
    assert sorted(counts.unread) == sorted((str(root / name), "hidden or system files") for name in hidden)
    (line,) = counts.details()
    assert line.startswith("hidden or system files not read: 7 (") and line.count(".data/") == 3 and "..." in line
    assert read(root / "._a.txt", root / ".ipynb_checkpoints")[0] == [
        "._a.txt", ".ipynb_checkpoints/f.txt", ".ipynb_checkpoints/g.txt",
    ]  # fmt: skip


def test_globs_match_hidden_files_like_a_shell_but_no_files_of_macos(tmp_path: Path) -> None:
    root = write(tmp_path, "a.txt", "._a.txt", ".b.txt", "__MACOSX/e.txt", "c/d.txt", ".g/h.txt")
    texts, counts = read(root / "**" / "*.txt")
    assert texts == ["a.txt", "c/d.txt"]
    assert counts.unread == [(str(root / "__MACOSX" / "e.txt"), "hidden or system files")]
    texts, counts = read(root / ".*.txt")
    assert texts == [".b.txt"] and counts.unread == [(str(root / "._a.txt"), "hidden or system files")]
    assert read(root / ".g" / "*.txt")[0] == [".g/h.txt"]
    assert read(root / "__MACOSX" / "*.txt")[0] == ["__MACOSX/e.txt"], "named"
    write(root, "x[1]/i.txt")
    assert read(root / "**" / "i.txt")[0] == ["x[1]/i.txt"]


def test_everything_else_in_a_folder_or_glob_is_named(tmp_path: Path) -> None:
    root = write(tmp_path, "a.txt", "b.csv", "c/d.odt", "c/e", "f.txt~", "g/i.txt")
    (root / "h.txt").symlink_to("gone.txt")
    os.mkfifo(root / "pipe.txt")
    others = ["b.csv", "c/d.odt", "c/e", "f.txt~"]
    special = ["h.txt", "pipe.txt"]
    texts, counts = read(root)
    assert texts == ["a.txt", "g/i.txt"]
    assert sorted(counts.unread) == sorted(
        [
            *((str(root / name), "files of other formats") for name in others),
            *((str(root / name), "broken links or special files") for name in special),
        ]
    )
    assert counts.details() == [
        f"files of other formats not read: 4 ({root / 'b.csv'}, {root / 'c/d.odt'}, {root / 'c/e'}, ...)",
        f"broken links or special files not read: 2 ({root / 'h.txt'}, {root / 'pipe.txt'})",
    ]
    texts, counts = read(root / "*")
    assert texts == ["a.txt"]
    assert sorted(counts.unread) == sorted(
        [
            *((str(root / name), "files of other formats") for name in ("b.csv", "f.txt~")),
            *((str(root / name), "broken links or special files") for name in special),
            *((str(root / name), "folders matched by a glob") for name in ("c", "g")),
        ]
    )
    texts, counts = read(root / "**")
    assert texts == ["a.txt", "g/i.txt"] and len(counts.unread) == len(others) + len(special)
    assert problem(root / "c").endswith(
        f"in this folder; files of other formats not read: 2 ({root / 'c/d.odt'}, {root / 'c/e'})"
    )


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    """Under their own path if they also lie in the folder, whatever the names of the links; cycles end."""
    root = write(tmp_path / "data", "m/a.txt", "m/n/b.txt").resolve()
    outside = write(tmp_path / "outside", "c.txt", "d/e.txt").resolve()
    (root / "0").symlink_to(root / "m")
    (root / "m" / "up").symlink_to(root)
    (root / "link").symlink_to(outside)
    (root / "link2").symlink_to(outside / "d")
    (outside / "back").symlink_to(root / "m")
    (root / "linked file.txt").symlink_to(tmp_path / "f.txt")
    write(tmp_path, "f.txt")
    expected = ["link/c.txt", "link/d/e.txt", "linked file.txt", "m/a.txt", "m/n/b.txt"]
    counts = DocumentCounts()
    assert [str(path.relative_to(root)) for path in files.find([str(root)], counts.unread)] == expected
    found = files.find([str(root / "**" / "*.txt")], counts.unread)
    assert [str(path.relative_to(root)) for path in found] == expected
    (tmp_path / "whole").symlink_to(root)
    for name in (tmp_path / "whole", tmp_path / "whole" / "**"):
        found = files.find([str(name)], counts.unread)
        assert [str(path.relative_to(tmp_path / "whole")) for path in found] == expected
    assert [str(path.relative_to(root)) for path in files.find([str(root / "0" / "*.txt")])] == ["0/a.txt"]
    assert counts.unread == []


def test_a_file_with_several_names_is_read_once(tmp_path: Path) -> None:
    """Under its own name rather than a link's. Snapshots in a cache of the Hub share files by links."""
    root = write(tmp_path / "data", "m.txt", "blobs/5f").resolve()
    for link, target in (("a.txt", "m.txt"), ("1/x.txt", "blobs/5f"), ("2/x.txt", "blobs/5f")):
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to(root / target)
    for name in (root, root / "**" / "*"):
        texts, counts = read(name)
        assert texts == ["blobs/5f", "m.txt"] and counts.read == 2
        further = [path for path, reason in counts.unread if reason == "further links to a file"]
        assert further == [str(root / "2/x.txt"), str(root / "a.txt")]
    assert read(root / "a.txt", root / "m.txt")[1].read == 2, "named"


def test_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, scandir = write(tmp_path, "a.txt", "b/c.txt"), os.scandir

    def denied(path: Any) -> Any:
        if Path(path) == root / "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    for name in (root, root / "**"):
        assert problem(name) == f"{root / 'b'}: can't be read: Permission denied"


def test_suffixes_in_capitals(tmp_path: Path) -> None:
    import pyarrow
    from backports import zstd
    from pyarrow.parquet import write_table

    row = b'{"text": "row"}\n'
    (tmp_path / "A.TXT").write_text("one\ntwo\n")
    (tmp_path / "B.JSONL").write_bytes(row)
    (tmp_path / "C.Jsonl.GZ").write_bytes(gzip.compress(row))
    (tmp_path / "D.md.ZST").write_bytes(zstd.compress(b"three"))
    write_table(pyarrow.Table.from_pylist([{"text": "four"}]), tmp_path / "E.PARQUET")
    expected = {"A.TXT": "one\ntwo\n", "B.JSONL": "row", "C.Jsonl.GZ": "row", "D.md.ZST": "three", "E.PARQUET": "four"}
    for name, text in expected.items():
        assert read(tmp_path / name)[0] == [text]
    texts, counts = read(tmp_path)
    assert texts == list(dict.fromkeys(expected.values())) and counts.read == 5
    lines = DataConfig(documents="lines")
    (ranges, more) = files.split_files([tmp_path / "A.TXT"], 2, lines)
    assert [len(ranges), len(more)] == [1, 1], "lines of a file in capitals can be split"
    assert [d.text for r in (*ranges, *more) for d in from_ranges([r], [], lines, DocumentCounts())] == ["one", "two"]
    long = tmp_path / "F.JSONL"
    long.write_bytes(b'{"text": "' + b"x" * SPLIT_FILE_CHARS + b'"}\n')
    assert not next(from_files([str(long)], DataConfig(), DocumentCounts())).splittable
    assert not hub.is_hub_name("missing.TXT") and not hub.is_hub_name("missing.json")


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


def test_files_that_need_the_documents_extra_are_counted_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("markitdown", "pypdf", "trafilatura"):
        monkeypatch.setitem(sys.modules, module, None)
    root = write(tmp_path, "a.pdf", "b.docx", "c.epub", "d.html", "e.HTM", "f.pptx", "g.txt")
    texts, counts = read(root)
    assert texts == ["g.txt"] and len(counts.unread) == 6
    (line,) = counts.details()
    shown = ", ".join(str(root / name) for name in ("a.pdf", "b.docx", "c.epub"))
    assert line.endswith(f"pip install 'anarchobot[documents]') not read: 6 ({shown}, ...)")
    assert problem(root / "a.pdf") == f"{root / 'a.pdf'}: to read .pdf files: pip install 'anarchobot[documents]'"
    (root / "g.txt").unlink()
    assert "pip install 'anarchobot[documents]') not read: 6" in problem(root)
